"""Whose turn it is at the decode worker: waiting, order, withdrawal, and preemption, over gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from handoff_messages import commit, frames, header, send
from worker_driver import Driver, Outcome, Tiny, code_of, connected, drain, eventually, running, running_workers

import decode_worker.serve
from branchline.core import Request
from branchline.v1 import decode_pb2

pytestmark = pytest.mark.wire

CONTEXT = 20
#: The batch's slots, by the tests' configuration.
SLOTS = 4


def new_request(workers: Driver, max_tokens: int = 8) -> Request:
    return workers.request(tuple(range(CONTEXT)), max_tokens)


@pytest.fixture
async def full(workers: Driver) -> AsyncIterator[list[decode_pb2.ReserveResponse]]:
    """Leases that take all slots; what a test leaves of them is given back."""
    leases = [await workers.reserve(new_request(workers)) for _ in range(SLOTS)]
    yield leases
    for lease in leases:
        await workers.abort(lease)


def waiting(workers: Driver, wait_ms: int = 15_000, **changes: Any) -> asyncio.Task[decode_pb2.ReserveResponse]:
    return asyncio.create_task(workers.reserve(new_request(workers), wait_ms=wait_ms, **changes))


async def queued(workers: Driver, count: int) -> None:
    async def reached() -> bool:
        return (await workers.status())[1].queued == count

    await eventually(reached, 5.0, lambda: f"{count} reservations should wait")


async def test_a_reservation_waits_until_there_is_room(workers: Driver, full: list[decode_pb2.ReserveResponse]) -> None:
    reserving = waiting(workers)
    await queued(workers, 1)
    _, status = await workers.status()
    assert (status.leases, status.tasks) == (SLOTS, 1)
    await asyncio.sleep(0.1)
    assert not reserving.done()
    await workers.abort(full[0])
    await workers.abort(await reserving)
    await queued(workers, 0)


async def test_without_waiting_the_answer_comes_at_once(
    workers: Driver, full: list[decode_pb2.ReserveResponse]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="no room for 1 sequences of 20 tokens") as error:
        await workers.reserve(new_request(workers))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await workers.status())[1].queued == 0
    assert len(full) == SLOTS


async def test_a_wait_ends_in_time(workers: Driver, full: list[decode_pb2.ReserveResponse]) -> None:
    before = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError, match=r"within 0\.3 s") as error:
        await workers.reserve(new_request(workers), wait_ms=300)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 0.3 <= time.monotonic() - before < 10
    await workers.abort(full[0])
    await queued(workers, 0)
    assert (await workers.status())[1].leases == SLOTS - 1


async def test_the_turn_goes_by_priority_and_age(workers: Driver, full: list[decode_pb2.ReserveResponse]) -> None:
    """One level of priority weighs as much as ten seconds of waiting."""
    order: list[str] = []

    async def reserve(name: str, **changes: Any) -> None:
        lease = await workers.reserve(new_request(workers), wait_ms=15_000, **changes)
        order.append(name)
        await workers.abort(lease)

    async with asyncio.TaskGroup() as tasks:
        asks = {
            "later": {"priority": -1},
            "first come": {},
            "second come": {},
            "old": {"queued_ms": 19_000},
            "older": {"queued_ms": 25_000, "priority": -1},
            "high": {"priority": 0, "queued_ms": 60_000},
        }
        for number, (name, changes) in enumerate(asks.items(), 1):
            tasks.create_task(reserve(name, **changes))
            await queued(workers, number)
        await workers.abort(full[0])
    assert order == ["high", "old", "older", "first come", "second come", "later"]


async def test_a_small_reservation_does_not_overtake(workers: Driver, full: list[decode_pb2.ReserveResponse]) -> None:
    large = waiting(workers, samples=3)
    await queued(workers, 1)
    small = waiting(workers)
    await queued(workers, 2)
    await workers.abort(full[0])
    await workers.abort(full[1])
    assert await code_of(workers.reserve(new_request(workers))) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not small.done()
    await workers.abort(full[2])
    leases = await large
    assert not small.done()
    await workers.abort(leases)
    await workers.abort(await small)


async def test_who_stops_waiting_makes_room_for_the_next(
    workers: Driver, full: list[decode_pb2.ReserveResponse]
) -> None:
    large = waiting(workers, samples=4)
    await queued(workers, 1)
    small = waiting(workers)
    await queued(workers, 2)
    await workers.abort(full[0])
    assert not small.done()
    large.cancel()
    await workers.abort(await small)
    await queued(workers, 0)


async def test_a_later_attempt_ends_the_waiting_of_an_earlier_one(
    workers: Driver, full: list[decode_pb2.ReserveResponse]
) -> None:
    request = new_request(workers)
    first = asyncio.create_task(workers.reserve(request, wait_ms=15_000))
    await queued(workers, 1)
    second = asyncio.create_task(workers.reserve(request, wait_ms=15_000, attempt=2))
    assert await code_of(first) is grpc.StatusCode.ABORTED
    assert await code_of(workers.reserve(request, wait_ms=15_000)) is grpc.StatusCode.ABORTED
    await workers.abort(full[0])
    await workers.abort(await second)


async def test_what_may_not_be_asked_for_is_refused_by_name(workers: Driver) -> None:
    for changes, complaint in (
        ({"priority": 101}, "priority must be between -100 and 100, got 101"),
        ({"priority": -101}, "priority must be between -100 and 100, got -101"),
        ({"context_length": 600, "max_length": 700, "wait_ms": 100}, "the context has 600 tokens"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=complaint) as error:
            await workers.reserve(new_request(workers), **changes)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_worker_that_stops_tells_who_waits(tiny: Tiny) -> None:
    async with AsyncExitStack() as decode, running_workers(tiny.config()) as helper:
        address = await decode.enter_async_context(running(decode_worker.serve.serve, tiny.config()))
        async with connected(helper.prefill_address, address) as workers:
            for _ in range(SLOTS):
                await workers.reserve(new_request(workers))
            reserving = waiting(workers)
            await queued(workers, 1)
            await decode.aclose()
            assert await code_of(reserving) is grpc.StatusCode.UNAVAILABLE


async def test_nothing_leaks_when_callers_give_up_in_the_moment_of_the_grant(workers: Driver) -> None:
    generator = random.Random(7)

    async def hold() -> None:
        """Comes and goes, so that there is room now and then."""
        lease = await workers.reserve(new_request(workers), wait_ms=15_000, samples=generator.randrange(1, SLOTS + 1))
        await asyncio.sleep(generator.random() * 0.005)
        await workers.abort(lease)

    async def give_up(after_s: float) -> None:
        call = waiting(workers, wait_ms=generator.choice([1, 5, 15_000]), samples=generator.randrange(1, 3))
        await asyncio.wait({call}, timeout=after_s)
        if not call.cancel() and call.exception() is None:
            await workers.abort(call.result())

    await asyncio.gather(*(hold() for _ in range(60)), *(give_up(generator.random() * 0.2) for _ in range(120)))
    # A lease whose answer met a cancelled call is nobody's: it expires.
    await workers.wait_until_idle(4.0)


async def started(workers: Driver, request: Request, **changes: Any) -> tuple[decode_pb2.ReserveResponse, Any]:
    """A request that runs, and its stream behind the first tokens."""
    lease = await workers.reserve(request, **changes)
    stream = await workers.attach(lease.lease_id, request)
    messages = frames(CONTEXT)
    await send(workers.decode, [header(lease.lease_id), *messages, commit(messages)])
    assert (await stream.read()).WhichOneof("event") == "tokens"
    return lease, stream


async def last_event(stream: Any) -> str:
    """Raises AioRpcError when the stream didn't end OK."""
    kind = ""
    while (event := await stream.read()) is not grpc.aio.EOF:
        kind = event.WhichOneof("event")
    return kind


async def test_a_higher_priority_takes_the_place_of_the_youngest_of_lower_ones(workers: Driver) -> None:
    running = [await started(workers, new_request(workers, 400), priority=1) for _ in range(SLOTS)]
    assert await code_of(workers.reserve(new_request(workers), priority=1)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    lease = await workers.reserve(new_request(workers), priority=2)
    assert await last_event(running[-1][1]) == "preempted"
    _, status = await workers.status()
    assert (status.preemptions, status.leases) == (1, SLOTS)
    for _, stream in running[:-1]:
        assert (await stream.read()).WhichOneof("event") == "tokens"
        stream.cancel()
    await workers.abort(lease)


async def test_nobody_is_preempted_in_vain_nor_out_of_turn(workers: Driver) -> None:
    """Four slots are needed, but one of the running is as important; and age counts for more than priority."""
    old = [await started(workers, new_request(workers, 400), queued_ms=30_000) for _ in range(2)]
    young = [await started(workers, new_request(workers, 400), priority=priority) for priority in (0, 2)]
    refused = workers.reserve(new_request(workers), priority=2, samples=2)
    assert await code_of(refused) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await workers.status())[1].preemptions == 0
    lease = await workers.reserve(new_request(workers), priority=2)
    assert await last_event(young[0][1]) == "preempted"
    assert await code_of(workers.reserve(new_request(workers), priority=2)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await workers.status())[1].preemptions == 1
    for _, stream in (*old, young[1]):
        stream.cancel()
    await workers.abort(lease)


async def test_a_preemption_ends_the_handoff_and_is_told_to_those_who_come_later(workers: Driver) -> None:
    request = new_request(workers)
    lease = await workers.reserve(request, samples=SLOTS)
    stream = await workers.attach(lease.lease_id, request)
    call = workers.decode.Handoff(timeout=20)
    await call.write(header(lease.lease_id))
    await call.write(frames(CONTEXT)[0])
    await call.read()
    other = await workers.reserve(new_request(workers), priority=1)
    assert await last_event(stream) == "preempted"
    assert await code_of(drain(call)) is grpc.StatusCode.ABORTED
    assert "comes first" in await call.details()
    late = await workers.attach(lease.sibling_lease_ids[0], request)
    assert await last_event(late) == "preempted"
    assert await code_of(send(workers.decode, [header(lease.lease_id)])) is grpc.StatusCode.ABORTED
    _, status = await workers.status()
    assert (status.preemptions, status.leases) == (SLOTS, 1)
    await workers.abort(other)


async def test_requests_that_outgrow_the_cache_take_turns_and_lose_nothing(tiny: Tiny) -> None:
    """As the gateway does it: whoever is preempted comes back with what it has, its age kept."""
    small = tiny.config(**{"engine.kv_cache_mib": 1})
    async with running_workers(tiny.config(), small) as workers:
        prompts = [tuple((7 * place + number) % 80 for place in range(60)) for number in range(4)]
        outcomes = await asyncio.gather(*(persist(workers, workers.request(one, 250)) for one in prompts))
        for one, outcome in zip(prompts, outcomes, strict=True):
            assert tuple(outcome.token_ids) == tiny.greedy(one, 250)
        _, status = await workers.status()
        assert status.preemptions > 0
        assert status.preemptions == sum(outcome.preemptions for outcome in outcomes)
        await workers.wait_until_idle()


@dataclasses.dataclass
class Persistent:
    token_ids: list[int]
    preemptions: int = 0


async def persist(workers: Driver, request: Request) -> Persistent:
    arrived, result = time.monotonic(), Persistent([])
    while True:
        rest = dataclasses.replace(request, emitted=tuple(result.token_ids))
        outcome = await attempt(workers, rest, arrived, result.preemptions + 1)
        result.token_ids += outcome.token_ids
        if not outcome.preempted:
            assert outcome.finish
            return result
        result.preemptions += 1


async def attempt(workers: Driver, request: Request, arrived: float, number: int) -> Outcome:
    queued_ms = int((time.monotonic() - arrived) * 1000)
    [outcome] = await workers.complete_samples(request, 1, attempt=number, wait_ms=18_000, queued_ms=queued_ms)
    return outcome
