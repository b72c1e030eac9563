"""Samples of one request share the prompt's blocks, the partial one copied; each is what it would be alone."""

from __future__ import annotations

import dataclasses

import pytest
from engine_helpers import BUSHY, TinyPipeline

from branchline.core import Request, SamplingParams
from branchline.engine.models.protocol import Models

pytestmark = pytest.mark.models


@pytest.mark.parametrize("tree", ["none", BUSHY, "dynamic:4,3,12"])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_samples_equal_single_requests(tiny: Models, tree: str, length: int) -> None:
    prompt = tuple((3 * index + index**2) % 12 for index in range(length))
    request = Request("r", prompt, 30, SamplingParams(1.0, seed=12))
    pipeline = TinyPipeline(tiny, tree, block_size=8)
    samples = pipeline.hand_off_samples(request, 4)
    full = length // 8
    blocks = [sample.allocation.blocks for sample in samples]
    assert all(own[:full] == blocks[0][:full] for own in blocks)
    tails = [block for own in blocks for block in own[full:]]
    assert len(set(tails)) == len(tails)
    texts = {sample.allocation: [sample.first_token] for sample in samples}
    while pipeline.decode.running:
        for result in pipeline.decode.step().results:
            texts[result.allocation] += result.token_ids
            if result.finish is not None:
                pipeline.decode.release(result.allocation)
        pipeline.decode.check_integrity()
    assert pipeline.decode.pool.used == 0
    assert len({tuple(text) for text in texts.values()}) > 1, "all samples are alike"
    for index, text in enumerate(texts.values()):
        sampling = dataclasses.replace(request.sampling, sample_index=index)
        alone = TinyPipeline(tiny, "none").run_text([dataclasses.replace(request, sampling=sampling)])
        assert text == alone["r"]


def test_samples_leave_one_by_one(tiny: Models) -> None:
    """The shared blocks stay until the last holder goes, whichever goes first."""
    pipeline = TinyPipeline(tiny, BUSHY, block_size=4)
    samples = pipeline.hand_off_samples(Request("r", (1, 2, 3, 4, 5, 6), 30, SamplingParams(1.0, seed=3)), 3)
    shared = samples[0].allocation.blocks[0]
    for sample in samples:
        assert shared in {block for other in pipeline.decode.live for block in other.blocks}
        pipeline.decode.release(sample.allocation)
        pipeline.decode.check_integrity()
    assert pipeline.decode.pool.used == 0
