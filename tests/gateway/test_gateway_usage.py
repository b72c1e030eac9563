"""What a request is told that it took, and what the prefill worker is told of its place in the queue."""

from __future__ import annotations

import time

import grpc
import pytest
from gateway_harness import PROMPT, house
from scripted_workers import ScriptedDecode, ScriptedPrefill

from branchline.wire.status import RpcFailure
from gateway.tokens import Tokens

pytestmark = pytest.mark.wire


async def test_cached_tokens_reach_the_client(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill(cached=2)], [ScriptedDecode()]) as h:
        for answer in (await h.complete(8), *await h.complete_all(3)):
            assert answer.finished.usage.cached_tokens == 2


async def test_cached_tokens_are_the_first_computation_s(tokens: Tokens) -> None:
    """The prefill after a failure finds what the one before it has computed: that was not saved for the client."""
    decode = ScriptedDecode(repeat=2, failing=1, failure=RpcFailure(grpc.StatusCode.UNAVAILABLE, "scripted"))
    async with house(tokens, [ScriptedPrefill(cached=1)], [decode]) as h:
        answer = await h.complete(8)
        assert answer.finished.failovers == 1
        assert len(h.prefills[0].requests[1].emitted) > 0
        assert answer.finished.usage.cached_tokens == 1


async def test_no_more_than_the_prompt_is_cached(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill(cached=1000)], [ScriptedDecode()]) as h:
        assert (await h.complete(8)).finished.usage.cached_tokens == len(PROMPT)


async def test_what_the_decode_worker_has_reaches_the_prefill_worker(tokens: Tokens) -> None:
    """It is asked with the whole context: after a failure that is what was emitted, too."""
    decode = ScriptedDecode(held=3, failing=1, failure=RpcFailure(grpc.StatusCode.UNAVAILABLE, "scripted"))
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        await h.complete(8)
        await h.complete_all(3)
        requests = h.prefills[0].requests
        assert len(requests[1].emitted) > 0
        assert [one.context for one in decode.reservations] == [[*one.prompt, *one.emitted] for one in requests]
        assert h.prefills[0].held == [3, 3, 3]


async def test_priority_and_age_reach_the_prefill_worker(tokens: Tokens) -> None:
    prefill = ScriptedPrefill(slow_s=0.2, failures=[None, RpcFailure(grpc.StatusCode.ABORTED, "scripted")])
    async with house(tokens, [prefill], [ScriptedDecode()]) as h:
        await h.complete(4, priority=-7)
        begun = time.monotonic()
        await h.complete(4, priority=3)
        took_ms = (time.monotonic() - begun) * 1000
        assert [priority for priority, _ in prefill.places] == [-7, 3, 3]
        first, second = (queued_ms for _, queued_ms in prefill.places[1:])
        assert first <= second <= took_ms, "an attempt that follows another has waited since the first one came"
