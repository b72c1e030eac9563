"""When blocks run out, the request of the largest rank gives its own back, and goes on later with the same text."""

from __future__ import annotations

import pytest
from engine_helpers import BUSHY, TinyPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dynamic_tree import prompts

from branchline.core import InvalidRequestError, Request, SamplingParams
from branchline.engine.models.protocol import Models

pytestmark = pytest.mark.models


def short_of_blocks(tiny: Models, tree: str, spare: int, pipelined: bool) -> TinyPipeline:
    """A pool with room for one sequence of 80 tokens and a little more."""
    pipeline = TinyPipeline(tiny, tree, pipelined=pipelined, block_size=4, max_batch=6, max_model_len=80)
    pool = pipeline.decode.pool
    pool.allocate(pool.total - pipeline.decode.caches.blocks_for(80 + 10) - spare)
    return pipeline


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    tree=st.sampled_from(["none", BUSHY, "dynamic:4,3,12"]),
    spare=st.integers(0, 12),
    pipelined=st.booleans(),
)
def test_preempted_requests_go_on_with_the_same_text(
    tiny: Models, seed: int, tree: str, spare: int, pipelined: bool
) -> None:
    requests = [
        Request(str(index), prompt, 45, SamplingParams(0.9, seed=index))
        for index, prompt in enumerate(prompts(seed, 6))
    ]
    expected = TinyPipeline(tiny, "none").run_text(requests)
    pipeline = short_of_blocks(tiny, tree, spare, pipelined)
    taken = pipeline.decode.pool.used
    outputs = {}
    running = {}
    waiting = list(requests)
    preemptions = 0
    while waiting or running:
        while waiting and pipeline.decode.can_allocate(len(waiting[0].context)):
            request = waiting.pop(0)
            sample = pipeline.hand_off(request, rank=float(request.request_id))
            outputs.setdefault(request.request_id, list(request.emitted)).append(sample.first_token)
            if sample.finish is None:
                running[sample.allocation] = request
            else:
                pipeline.decode.release(sample.allocation)
        step = pipeline.decode.step()
        for result in step.results:
            outputs[running[result.allocation].request_id] += result.token_ids
            if result.finish is not None:
                del running[result.allocation]
                pipeline.decode.release(result.allocation)
        for allocation in step.preempted:
            assert allocation.released
            assert all(allocation.rank >= other.rank for other in pipeline.decode.live)
            preemptions += 1
            request = running.pop(allocation)
            emitted = tuple(outputs[request.request_id])
            waiting.insert(0, Request(request.request_id, request.prompt, 45, request.sampling, emitted))
        pipeline.decode.pool.check_integrity()
        assert pipeline.decode.pool.used - taken == len({b for a in pipeline.decode.live for b in a.blocks})
    assert outputs == expected
    assert pipeline.decode.pool.used == taken


def test_blocks_do_run_out_in_these_tests(tiny: Models) -> None:
    pipeline = short_of_blocks(tiny, BUSHY, 0, False)
    first = pipeline.hand_off(Request("first", (1, 2, 3), 70), rank=1.0)
    second = pipeline.hand_off(Request("second", (3, 2, 1), 70), rank=2.0)
    preempted = []
    while not preempted:
        preempted = pipeline.decode.step().preempted
    assert preempted == [second.allocation]
    assert pipeline.decode.live == [first.allocation]


def test_a_group_whose_context_is_not_shared_yet_goes_as_a_whole(tiny: Models) -> None:
    pipeline = short_of_blocks(tiny, "none", 0, False)
    pipeline.hand_off(Request("first", (1, 2, 3), 70), rank=1.0)
    group = pipeline.decode.allocate(20, 60, samples=3, rank=2.0)
    preempted = []
    while not preempted:
        preempted = pipeline.decode.step().preempted
    assert set(preempted) == set(group)
    assert all(allocation.released for allocation in group)


def test_what_never_fits_is_refused(tiny: Models) -> None:
    decode = TinyPipeline(tiny, "none", max_batch=4, max_model_len=60).decode
    decode.check(59, 60, samples=4)
    with pytest.raises(InvalidRequestError, match="5 samples"):
        decode.check(10, 60, samples=5)
    with pytest.raises(InvalidRequestError, match="at most 59"):
        decode.check(60, 61)
