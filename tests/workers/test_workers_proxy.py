"""Prefill to decode through a TCP proxy that spoils the road: right tokens, or the right error in time, no leaks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
from tcp_proxy import tcp_proxy
from worker_driver import Driver, Tiny, running_workers

pytestmark = pytest.mark.wire

#: The hand-off of this prompt is 75 KB in seven frames.
PROMPT = tuple(random.Random(1).randrange(80) for _ in range(70))
#: What the gateway answers with another attempt.
RIGHT_ERRORS = {grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE}
#: A stall (two seconds), a ping that isn't answered (six), the pauses before a stream is opened again.
DEADLINE_S = 15.0


@pytest.fixture(params=[1, 2], ids=["one stream", "two streams"])
async def pair(request: pytest.FixtureRequest, tiny: Tiny) -> AsyncIterator[Driver]:
    async with running_workers(tiny.config(**{"transfer.streams": request.param})) as driver:
        yield driver
        await driver.wait_until_idle(timeout_s=3.0)


async def outcome(pair: Driver, tiny: Tiny, begin: int = 0) -> grpc.StatusCode | None:
    """None when the tokens came, and were right. Of prompts that begin with different tokens nothing is reused."""
    prompt = (begin, *PROMPT[1:])
    try:
        result = await asyncio.wait_for(pair.complete(pair.request(prompt, 8)), DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    assert tuple(result.token_ids) == tiny.greedy(prompt, 8)
    return None


@pytest.mark.parametrize("fault", ["delay", "reset", "truncate"])
@pytest.mark.parametrize("after", [3_000, 40_000])
async def test_a_handoff_survives_what_ends_or_delays_a_connection(
    pair: Driver, tiny: Tiny, fault: str, after: int
) -> None:
    async with tcp_proxy(pair.decode_address, fault, after) as (address, proxy):
        pair.decode_address = address
        assert await outcome(pair, tiny) is None
        assert proxy.faults > 0 or proxy.connections > 1


async def test_a_connection_that_stalls_ends_the_handoff_in_time_or_is_replaced(pair: Driver, tiny: Tiny) -> None:
    async with tcp_proxy(pair.decode_address, "stall", 20_000) as (address, proxy):
        pair.decode_address = address
        code = await outcome(pair, tiny)
        assert code is None or code in RIGHT_ERRORS
        assert proxy.faults > 0


async def test_a_flipped_bit_is_mended_or_ends_the_handoff(pair: Driver, tiny: Tiny) -> None:
    """Most flips hit the KV, and the frame comes again; one in HTTP/2's own bytes may cost the connection."""
    generator, codes, direct = random.Random(11), [], pair.decode_address
    for number in range(12):
        bit, after = generator.randrange(8), generator.randrange(3_000, 70_000)
        async with tcp_proxy(direct, "corrupt", after, bit=bit) as (address, _):
            pair.decode_address = address
            codes.append(await outcome(pair, tiny, number))
    assert set(codes) <= {None} | RIGHT_ERRORS
    assert codes.count(None) >= 10, codes
