"""Prefill to decode over real gRPC: the tokens, and what happens when something is in the way."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest
from bad_road import bad_road
from worker_driver import Driver, Outcome, Tiny, code_of, running_workers

from branchline.core import SamplingParams
from branchline.v1 import decode_pb2, types_pb2

pytestmark = pytest.mark.wire


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(80) for _ in range(length))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 70])
async def test_tokens_are_those_of_plain_greedy_decoding(workers: Driver, tiny: Tiny, length: int) -> None:
    outcome = await workers.complete(workers.request(prompt(length), 24))
    assert tuple(outcome.token_ids) == tiny.greedy(prompt(length), 24)
    assert outcome.finish == types_pb2.FINISH_REASON_LENGTH
    assert outcome.speculation.accepted + outcome.speculation.target_forwards == 23
    assert outcome.speculation.drafted > 0


async def test_requests_at_once(workers: Driver, tiny: Tiny) -> None:
    prompts = [prompt(10 + 9 * seed, seed) for seed in range(4)]
    outcomes = await asyncio.gather(*(workers.complete(workers.request(one, 20)) for one in prompts))
    assert [tuple(outcome.token_ids) for outcome in outcomes] == [tiny.greedy(one, 20) for one in prompts]


async def test_a_request_goes_on_behind_what_was_emitted(workers: Driver) -> None:
    """As after a failover: the same tokens, the indices counted on; sampled ones, too."""
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0, seed=7)):
        whole = await workers.complete(workers.request(prompt(9), 16, sampling=sampling))
        emitted = tuple(whole.token_ids[:6])
        rest = await workers.complete(workers.request(prompt(9), 16, sampling=sampling, emitted=emitted))
        assert emitted + tuple(rest.token_ids) == tuple(whole.token_ids)


async def test_nothing_is_shipped_when_the_first_token_ends_the_request(workers: Driver, tiny: Tiny) -> None:
    first = tiny.greedy(prompt(30), 1)[0]
    for request, finish in (
        (workers.request(prompt(30), 1), types_pb2.FINISH_REASON_LENGTH),
        (workers.request(prompt(30), 9, stop_token_ids=(first,)), types_pb2.FINISH_REASON_STOP),
    ):
        outcome = await workers.complete(request)
        assert (outcome.token_ids, outcome.finish) == ([first], finish)
    await workers.wait_until_idle()


async def test_another_draft_head_means_a_cold_start(tiny: Tiny) -> None:
    for drafter in (str(tiny.other_head), "none"):
        async with running_workers(tiny.config(**{"model.draft": drafter}), tiny.config()) as workers:
            request = workers.request(prompt(20), 16)
            lease = await workers.reserve(request)
            assert not lease.accepts_draft
            await workers.abort(lease)
            outcome = await workers.complete(request)
            assert tuple(outcome.token_ids) == tiny.greedy(prompt(20), 16)
            _, status = await workers.status()
            assert status.cold_starts == 1
            assert status.speculation.drafted > 0


async def test_without_a_draft_head_decoding_is_plain(tiny: Tiny) -> None:
    plain = tiny.config(**{"model.draft": "none", "model.tree": "none"})
    async with running_workers(tiny.config(), plain) as workers:
        outcome = await workers.complete(workers.request(prompt(20), 16))
        assert tuple(outcome.token_ids) == tiny.greedy(prompt(20), 16)
        assert outcome.speculation == types_pb2.Speculation(target_forwards=15)
        _, status = await workers.status()
        assert (status.tree, status.cold_starts) == ("none", 0)


async def test_another_dtype_is_refused_by_name(tiny: Tiny) -> None:
    async with running_workers(tiny.config(**{"model.dtype": "bfloat16"}), tiny.config()) as workers:
        with pytest.raises(grpc.aio.AioRpcError, match="dtype: float32 != bfloat16") as error:
            await workers.reserve(workers.request(prompt(4), 4))
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(("accident", "at"), [("damage", 1), ("damage", 3), ("break", 1), ("break", 2), ("break", 5)])
async def test_a_handoff_survives_an_accident(workers: Driver, tiny: Tiny, accident: str, at: int) -> None:
    async with bad_road(workers.decode_address, accident, at) as (address, road):
        workers.decode_address = address
        outcome = await workers.complete(workers.request(prompt(70), 16))
        assert tuple(outcome.token_ids) == tiny.greedy(prompt(70), 16)
        assert road.streams == (1 if accident == "damage" else 2)


async def test_a_handoff_that_is_not_answered_ends_in_time(workers: Driver) -> None:
    """Swallowed messages: the sender gives up, or the receiver aborts the lease, whichever is first."""
    async with bad_road(workers.decode_address, "silence", 2) as (address, _):
        workers.decode_address = address
        request = workers.request(prompt(70), 16)
        lease = await workers.reserve(request)
        stream = await workers.attach(lease.lease_id, request)
        code = await asyncio.wait_for(code_of(workers.start_prefill(request, lease)), 8.0)
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
        stream.cancel()
        await workers.wait_until_idle()


async def test_prefill_says_why_it_could_not_hand_off(workers: Driver) -> None:
    request = workers.request(prompt(40), 8)
    lease = await workers.reserve(request)
    gone = decode_pb2.ReserveResponse(lease_id="gone", accepts_draft=True)
    assert await code_of(workers.start_prefill(request, gone)) is grpc.StatusCode.ABORTED
    await workers.abort(lease)
    assert await code_of(workers.start_prefill(request, lease)) is grpc.StatusCode.ABORTED
    for address, code in (
        ("127.0.0.1:1", grpc.StatusCode.UNAVAILABLE),
        ("nowhere", grpc.StatusCode.INVALID_ARGUMENT),
    ):
        workers.decode_address = address
        assert await code_of(workers.start_prefill(request, lease)) is code
    too_long = workers.request((1,) * 600, 8)
    assert await code_of(workers.start_prefill(too_long, lease)) is grpc.StatusCode.INVALID_ARGUMENT
    not_a_token = workers.request((80,), 8)
    assert await code_of(workers.start_prefill(not_a_token, lease)) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_handoff_ends_when_its_lease_is_aborted(workers: Driver) -> None:
    request = workers.request(prompt(500), 8)
    lease = await workers.reserve(request)
    stream = await workers.attach(lease.lease_id, request)
    call = workers.start_prefill(request, lease)
    await asyncio.sleep(0.02)
    stream.cancel()
    assert await code_of(call) is grpc.StatusCode.ABORTED
    await workers.wait_until_idle()


async def test_outcome_compares_first_tokens(workers: Driver) -> None:
    """The driver's own check: decode's opening token must be prefill's."""
    request = workers.request(prompt(12), 4)
    lease = await workers.reserve(request)
    stream = await workers.attach(lease.lease_id, request)
    await code_or_nothing(workers.start_prefill(request, lease))
    with pytest.raises(AssertionError, match="repeats"):
        await workers.relay(stream, request, Outcome(token_ids=[-1]))
    stream.cancel()


async def code_or_nothing(call: grpc.aio.UnaryStreamCall) -> None:
    async for _ in call:
        pass
