"""The iteration can be captured: it reads nothing back to the host, and one recording serves every later call.

What a CUDA graph does is done here on any machine: the iteration is traced once for each key, on idle slots, and the
trace is replayed on other lengths, block tables, topologies and sampling settings.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_helpers import BUSHY, VOCAB, TinyPipeline
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from branchline.core import Request, SamplingParams
from branchline.engine.cache import BlockTables
from branchline.engine.execute import Program, Tensors
from branchline.engine.filters import Filter
from branchline.engine.models.protocol import Models
from branchline.engine.sampling import SamplingVariant

pytestmark = pytest.mark.models

TREES = ["none", BUSHY, "chain:3", "dynamic:3,3,8"]
VARIANTS = [
    SamplingVariant(),
    SamplingVariant(noise=True),
    SamplingVariant(noise=True, filters=Filter.TOP_K | Filter.TOP_P, edits=True, logprobs=True),
]


class TraceExecutor:
    """Traces a program at its first call and replays the trace from then on; an `execute.Executor`."""

    def __init__(self, idle_slot: int) -> None:
        self.traces: dict[tuple[Any, ...], torch.fx.GraphModule] = {}
        self.replays = 0
        self._idle_slot = idle_slot

    def __call__(self, key: tuple[Any, ...], program: Program, *inputs: torch.Tensor) -> Tensors:
        with torch.inference_mode(False), torch.no_grad():
            slots, block_table, *others = (tensor.clone() for tensor in inputs)
            if key not in self.traces:
                idle = torch.full_like(slots, self._idle_slot), torch.zeros_like(block_table)
                self.traces[key] = make_fx(program)(*idle, *others)
            outputs: Tensors = self.traces[key](slots, block_table, *others)
        self.replays += 1
        return outputs


def requests() -> list[Request]:
    """Settings of every kind, lengths that cross blocks, more requests than slots."""
    generator = torch.Generator().manual_seed(3)
    settings = [
        SamplingParams(),
        SamplingParams(0.7, seed=5),
        SamplingParams(1.3, 0.9, 5, seed=6),
        SamplingParams(1.0, min_p=0.05, seed=7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
        SamplingParams(repetition_penalty=1.5, logit_bias=((3, 2.0),), bad_words=((1, 2), (4,))),
        SamplingParams(0.9, seed=8, sample_index=2),
    ]
    result = []
    for index in range(12):
        length = int(torch.randint(1, 30, (), generator=generator))
        prompt = tuple(torch.randint(VOCAB, (length,), generator=generator).tolist())
        logprobs = 3 if index % 4 == 3 else None
        result.append(
            Request(
                str(index),
                prompt,
                9 + index,
                settings[index % len(settings)],
                stop_token_ids=(index % VOCAB,),
                min_tokens=4,
                logprobs=logprobs,
                draft_nodes=[None, 2, 0][index % 3],
            )
        )
    return result


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("variant", VARIANTS, ids=["greedy", "noise", "everything"])
def test_an_iteration_runs_on_tensors_without_data(tiny: Models, tree: str, variant: SamplingVariant) -> None:
    """Under FakeTensorMode `.item()` and its like raise."""
    pipeline = TinyPipeline(tiny, tree)
    pipeline.hand_off(Request("one", (1, 2, 3), 8))
    decode = pipeline.decode
    slots, tables = torch.tensor([0, decode.max_batch]), BlockTables(torch.ones(2, 12, dtype=torch.int64), (12, 8))
    iteration = decode.iteration(decode.tree.num_nodes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        emission = iteration.run(slots, tables, variant)
        assert emission.token_ids.shape == (2, decode.tree.depth + 1)
        with pytest.raises(DataDependentOutputException):
            emission.count.sum().item()


@pytest.mark.parametrize("tree", TREES)
def test_a_trace_replays_as_the_eager_iteration_runs(tiny: Models, tree: str) -> None:
    eager = TinyPipeline(tiny, tree, max_batch=4).run(requests(), in_flight=4)
    executor = TraceExecutor(idle_slot=4)
    replayed = TinyPipeline(tiny, tree, executor, max_batch=4).run(requests(), in_flight=4)
    assert {name: output.token_ids for name, output in replayed.items()} == {
        name: output.token_ids for name, output in eager.items()
    }
    assert [output.logprobs for output in replayed.values()] == [output.logprobs for output in eager.values()]
    assert executor.replays > 3 * len(executor.traces), "hardly a trace was used twice"
    for trace in executor.traces.values():
        operations = {str(node.target) for node in trace.graph.nodes}
        assert not any("_local_scalar_dense" in name or "nonzero" in name for name in operations)


@pytest.mark.parametrize("tree", TREES)
def test_iterations_in_flight_change_nothing(tiny: Models, tree: str) -> None:
    """The next one is launched before the last one is read, as on CUDA."""
    expected = TinyPipeline(tiny, tree, max_batch=4).run(requests(), in_flight=4)
    pipelined = TinyPipeline(tiny, tree, pipelined=True, max_batch=4).run(requests(), in_flight=4)
    for name, output in expected.items():
        assert pipelined[name].token_ids == output.token_ids
        assert pipelined[name].finish == output.finish
