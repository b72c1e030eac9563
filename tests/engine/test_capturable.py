"""The iteration reads nothing back to the host: under FakeTensorMode `.item()` and its like raise."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import BUSHY, TinyPipeline
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from branchline.core import Request
from branchline.engine.models.protocol import Models
from branchline.engine.sampling import SamplingVariant

pytestmark = pytest.mark.models


@pytest.mark.parametrize("tree", ["none", BUSHY])
@pytest.mark.parametrize("variant", list(SamplingVariant))
def test_an_iteration_runs_on_tensors_without_data(tiny: Models, tree: str, variant: SamplingVariant) -> None:
    pipeline = TinyPipeline(tiny, tree)
    pipeline.hand_off(Request("one", (1, 2, 3), 8))
    decode = pipeline.decode
    slots, table = torch.tensor([0, decode.max_batch]), torch.ones(2, 12, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        emission = decode._iteration.run(slots, table, variant)
        assert emission.token_ids.shape == (2, decode._tree.depth + 1)
        with pytest.raises(DataDependentOutputException):
            emission.count.sum().item()
