"""What the hand-off promises of its own: leases end when nobody keeps them alive, workers that don't fit say where, a
broken stream goes on where it was."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator

import grpc
import pytest
from fake_transport import FakeTransport, Faults
from handoff_messages import frames, header
from handoff_world import random_frames, receiving, ship
from worker_driver import Driver, Tiny, code_of, drain, eventually, running_workers

from branchline.v1 import decode_pb2, types_pb2
from branchline.wire.kv_codec import Incoming, part_of
from branchline.wire.status import RpcFailure
from decode_worker.handoff import ACKNOWLEDGE_FRAMES

pytestmark = pytest.mark.wire

CONTEXT = 20
TTL_S = 1.0


@pytest.fixture
async def short(tiny: Tiny) -> AsyncIterator[Driver]:
    """Workers whose leases end soon."""
    async with running_workers(tiny.config(**{"decode.lease_ttl_s": TTL_S})) as workers:
        yield workers
        await workers.wait_until_idle()


async def begun(workers: Driver, lease_id: str) -> grpc.aio.StreamStreamCall:
    """A hand-off that has brought its first frame."""
    call = workers.decode.Handoff(timeout=20)
    await call.write(header(lease_id))
    await call.read()
    await call.write(frames(CONTEXT)[0])
    assert (await call.read()).next_index == 1
    return call


async def test_a_lease_without_attach_lives_by_heartbeats_and_ends_without_them(short: Driver) -> None:
    """Half a hand-off is in the cache when the prefill worker is heard no more."""
    lease = await short.reserve(short.request(tuple(range(CONTEXT)), 8))
    call = await begun(short, lease.lease_id)
    for _ in range(5):
        await asyncio.sleep(TTL_S / 3)
        await call.write(header(lease.lease_id))
    call.cancel()
    await asyncio.sleep(TTL_S / 2)
    _, status = await short.status()
    assert status.leases == 1, "it could have been resumed"
    assert status.blocks_used > 0
    await eventually(short.decode_idle, TTL_S, lambda: "the lease outlives its time")
    late = short.decode.Handoff(timeout=20)
    await late.write(header(lease.lease_id))
    assert await code_of(drain(late)) is grpc.StatusCode.ABORTED
    assert "nobody used it" in await late.details()


async def test_a_stream_that_is_open_but_silent_keeps_nothing_alive(short: Driver) -> None:
    lease = await short.reserve(short.request(tuple(range(CONTEXT)), 8))
    call = await begun(short, lease.lease_id)
    await eventually(short.decode_idle, 1.5 * TTL_S, lambda: "the lease outlives its time")
    assert await code_of(drain(call)) is grpc.StatusCode.ABORTED


async def test_an_attach_that_is_closed_ends_the_lease_at_once(short: Driver) -> None:
    """Whatever the hand-off is doing."""
    request = short.request(tuple(range(CONTEXT)), 8)
    lease = await short.reserve(request)
    stream = await short.attach(lease.lease_id, request)
    call = await begun(short, lease.lease_id)
    stream.cancel()
    assert await asyncio.wait_for(code_of(drain(call)), TTL_S / 2) is grpc.StatusCode.ABORTED
    assert "token stream was closed" in await call.details()


async def test_every_fact_of_the_fingerprint_is_checked_and_named(workers: Driver) -> None:
    prefill, _ = await workers.status()
    ours = dict(prefill.fingerprint.target)
    assert len(ours) > 5
    request = workers.request(tuple(range(CONTEXT)), 8)
    for name in [*ours, "something new"]:
        others = types_pb2.Fingerprint(target=ours | {name: "another"}, draft=prefill.fingerprint.draft)
        message = decode_pb2.ReserveRequest(
            request_id=request.request_id, context_length=CONTEXT, max_length=28, fingerprint=others, attempt=1
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await workers.decode.Reserve(message, timeout=5)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"{name}: {ours.get(name, '(absent)')} != another" in (refused.value.details() or "")
    assert (await workers.status())[1].leases == 0


@pytest.mark.parametrize("acknowledged", [0, 1, 9])
async def test_a_broken_stream_goes_on_at_the_last_acknowledged_frame(tiny: Tiny, acknowledged: int) -> None:
    """Nothing that was acknowledged is sent again, and nothing else is left out."""
    carried: list[list[int]] = []
    answers: list[list[int]] = []

    async with receiving(tiny.config()) as world:

        async def receive(requests: AsyncIterator[Incoming]):
            sent, heard = [], []
            carried.append(sent)
            answers.append(heard)

            async def noted() -> AsyncIterator[Incoming]:
                async for request in requests:
                    name, part = part_of(request)
                    if name in ("kv", "draft"):
                        sent.append(part.index)
                    yield request

            async with contextlib.aclosing(world.receive(noted())) as responses:
                async for response in responses:
                    heard.append(response.next_index)
                    yield response
                    if len(carried) == 1 and response.next_index >= acknowledged:
                        raise RpcFailure(grpc.StatusCode.UNAVAILABLE, "the road is broken")

        lease, messages = await world.lease(40), random_frames(40, 20, text=1)
        transport = FakeTransport(receive)
        await asyncio.wait_for(ship(transport, lease, messages), 10.0)
        assert await world.kv_is(lease, messages)
        assert transport.opened == 2
        resumed = answers[1][0]
        assert resumed >= answers[0][-1] >= acknowledged
        assert carried[1] == list(range(resumed, len(messages)))
        # Answers come often enough that little is sent twice: what was on its way, no more.
        assert all(later - earlier <= ACKNOWLEDGE_FRAMES + 4 for earlier, later in itertools.pairwise(answers[0]))
        world.sessions.live.abort(lease.lease_id, "the test is over")
        await transport.settle()


async def test_frames_come_twice_and_in_any_order_over_several_streams(tiny: Tiny) -> None:
    came: list[int] = []

    async with receiving(tiny.config()) as world:

        async def receive(requests: AsyncIterator[Incoming]):
            async def noted() -> AsyncIterator[Incoming]:
                async for request in requests:
                    name, part = part_of(request)
                    if name in ("kv", "draft"):
                        came.append(part.index)
                    yield request

            async with contextlib.aclosing(world.receive(noted())) as responses:
                async for response in responses:
                    yield response

        lease, messages = await world.lease(40), random_frames(40, 20, text=2)
        transport = FakeTransport(receive, 3, Faults(doubled=0.5, delayed=0.5, delay_s=0.02), random.Random(3))
        totals = await asyncio.wait_for(ship(transport, lease, messages), 10.0)
        assert transport.opened == 3
        assert came != sorted(came), "they came in order: nothing was tested"
        assert len(came) > len(set(came)) == len(messages) == totals.frames
        assert await world.kv_is(lease, messages)
        world.sessions.live.abort(lease.lease_id, "the test is over")
        await transport.settle()
