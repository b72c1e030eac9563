"""The hand-off over a fake transport, to a real receiver: repair, several streams, and nothing left over."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest
from fake_transport import FakeTransport, Faults
from handoff_world import TTL_S, World, random_frames, receiving, sender, ship
from worker_driver import Tiny, eventually

from branchline.wire.kv_codec import KvMessage
from branchline.wire.status import RpcFailure
from decode_worker.flow import WINDOW_FRAMES

pytestmark = pytest.mark.wire

CONTEXT = 40
#: What a hand-off may end with when the road is bad, seen from the gateway: another attempt may do better.
RIGHT_ERRORS = {grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE}

#: Of one hand-off: a few stalls, of as many streams, and the pauses before they are opened again.
DEADLINE_S = 20 * TTL_S


@pytest.fixture
async def world(tiny: Tiny) -> AsyncIterator[World]:
    async with receiving(tiny.config(**{"engine.max_batch": 16})) as world:
        yield world
        await eventually(world.idle, 2.0, lambda: "leases or blocks are still in use")


@pytest.mark.parametrize("streams", [1, 3])
async def test_a_handoff_arrives_byte_for_byte(world: World, streams: int) -> None:
    transport = FakeTransport(world.receive, streams)
    lease, messages = await world.lease(CONTEXT), random_frames(CONTEXT, 20, text=1)
    totals = await ship(transport, lease, messages)
    assert (totals.frames, totals.tree_nodes) == (22, 2)
    assert totals.kv_bytes == sum(one.kv_bytes for one in messages if isinstance(one, KvMessage))
    assert world.ready(lease)
    assert await world.kv_is(lease, messages)
    assert transport.opened == streams
    world.sessions.live.abort(lease.lease_id, "the test is over")
    await transport.settle()


@pytest.mark.parametrize(
    "faults",
    [Faults(damaged=0.03), Faults(lost=0.1), Faults(doubled=0.5), Faults(delayed=0.5), Faults(broken=0.03)],
    ids=str,
)
@pytest.mark.parametrize("streams", [1, 3])
async def test_one_kind_of_fault_costs_no_handoff(world: World, faults: Faults, streams: int) -> None:
    """What is damaged, lost or doubled is mended, and a broken stream is resumed."""
    for seed in range(3):
        transport = FakeTransport(world.receive, streams, faults, random.Random(seed))
        lease, messages = await world.lease(CONTEXT), random_frames(CONTEXT, 20, seed)
        await asyncio.wait_for(ship(transport, lease, messages), 10.0)
        assert world.ready(lease)
        assert await world.kv_is(lease, messages)
        world.sessions.live.abort(lease.lease_id, "the test is over")
        await transport.settle()


async def test_streams_that_were_opened_again_are_counted(world: World) -> None:
    retries = 0
    for seed in range(4):
        transport = FakeTransport(world.receive, 1, Faults(broken=0.03), random.Random(seed))
        lease = await world.lease(CONTEXT)
        sending = sender(transport, lease, random_frames(CONTEXT, 20, seed))
        await asyncio.wait_for(sending.run(), 10.0)
        assert sending.retries == transport.opened - 1
        retries += sending.retries
        world.sessions.live.abort(lease.lease_id, "the test is over")
        await transport.settle()
    assert retries > 0


async def test_damaged_data_breaks_no_stream(world: World) -> None:
    """The frame is asked for again on the stream that is open."""
    for seed in range(5):
        transport = FakeTransport(world.receive, 1, Faults(data=0.3), random.Random(seed))
        lease, messages = await world.lease(CONTEXT), random_frames(CONTEXT, 20, seed)
        await asyncio.wait_for(ship(transport, lease, messages), 5.0)
        assert transport.opened == 1
        assert await world.kv_is(lease, messages)
        world.sessions.live.abort(lease.lease_id, "the test is over")
        await transport.settle()


async def test_a_frame_that_always_comes_damaged_ends_the_handoff(world: World) -> None:
    transport = FakeTransport(world.receive, 1, Faults(data=1.0))
    lease = await world.lease(CONTEXT)
    with pytest.raises(RpcFailure, match="damaged 9 times") as caught:
        await asyncio.wait_for(ship(transport, lease, random_frames(CONTEXT, 3, text=0)), 5.0)
    assert caught.value.code is grpc.StatusCode.ABORTED
    assert lease.state.ended
    await transport.settle()


@pytest.mark.parametrize("streams", [1, 3])
async def test_a_road_that_swallows_everything_is_given_up_in_time(world: World, streams: int) -> None:
    transport = FakeTransport(world.receive, streams, Faults(stalled=1.0))
    lease, began = await world.lease(CONTEXT), time.monotonic()
    with pytest.raises(RpcFailure) as caught:
        await ship(transport, lease, random_frames(CONTEXT, 20, text=0))
    assert caught.value.code in RIGHT_ERRORS
    assert time.monotonic() - began < 3 * TTL_S
    world.sessions.live.abort(lease.lease_id, "the test is over")
    await transport.settle()


async def test_the_window_bounds_what_is_in_flight_over_all_streams(world: World) -> None:
    """The engine takes nothing: the receiver holds a window full and a frame for each stream, the rest waits."""
    engine_may_go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    def block() -> None:
        asyncio.run_coroutine_threadsafe(engine_may_go_on.wait(), loop).result(20)

    lease, messages = await world.lease(CONTEXT), random_frames(CONTEXT, CONTEXT, text=3)
    blocked = world.sessions.thread.submit(block)
    transport = FakeTransport(world.receive, 4)
    shipping = asyncio.create_task(ship(transport, lease, messages))
    flow = world.sessions.live.find(lease.lease_id).group.flow
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert flow.in_flight <= WINDOW_FRAMES
    assert flow.in_flight == WINDOW_FRAMES
    engine_may_go_on.set()
    await asyncio.wait_for(shipping, 5.0)
    await blocked
    assert await world.kv_is(lease, messages)
    world.sessions.live.abort(lease.lease_id, "the test is over")
    await transport.settle()


async def test_a_thousand_handoffs_over_a_bad_road_leave_nothing(world: World) -> None:
    """Each ends right or with the right error, within its deadline; some are cancelled, some aborted on the way. Some
    begin like others, and ship only the rest; now and then what is kept of those is lost."""
    generator = random.Random(7)
    tasks_before = len(asyncio.all_tasks())
    ended: Counter[str] = Counter()

    async def one(seed: int) -> None:
        rare = 0.1 * generator.random() ** 3
        faults = Faults(rare, rare, rare, 2 * rare, rare, rare / 2, rare / 20)
        transport = FakeTransport(world.receive, generator.choice([1, 1, 2, 4]), faults, random.Random(seed))
        context, text = generator.randrange(2, CONTEXT), generator.randrange(20)
        lease = await world.lease(context, text=text)
        messages = random_frames(context, generator.randrange(1, 12), text, lease.held_tokens)
        shipping = asyncio.create_task(ship(transport, lease, messages))
        fate = generator.random()
        if fate < 0.1:
            await asyncio.sleep(0.01 * generator.random())
            if fate < 0.05:
                shipping.cancel()
            else:
                world.sessions.live.abort(lease.lease_id, "the gateway gave up")
        await asyncio.wait({shipping}, timeout=DEADLINE_S)
        assert shipping.done(), f"hand-off {seed} is late"
        if shipping.cancelled():
            ended["cancelled"] += 1
        elif (error := shipping.exception()) is not None:
            assert isinstance(error, RpcFailure), error
            assert error.code in RIGHT_ERRORS, error
            ended[error.code.name] += 1
        elif not lease.state.ended:  # else it was aborted when all had come
            assert world.ready(lease)
            assert await world.kv_is(lease, random_frames(context, 1, text))  # what it held, too
            ended["ready"] += 1
            ended["reused"] += lease.held_tokens > 0
        if seed % 100 == 0:
            await world.sessions.thread.submit(world.sessions.engine.runner.pool.forget_free)
        world.sessions.live.abort(lease.lease_id, "the test is over")
        await asyncio.wait_for(transport.settle(), 5.0)

    waiting = iter(range(1000))

    async def worker() -> None:
        for seed in waiting:
            await one(seed)

    await asyncio.gather(*(worker() for _ in range(16)))
    assert ended["ready"] > 700, ended
    assert min(ended["cancelled"], ended["ABORTED"]) > 10, ended
    assert ended["reused"] > 50, ended
    assert await world.idle()
    pool = world.sessions.engine.runner.pool
    assert pool.free == pool.total
    pool.check_integrity()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == tasks_before
