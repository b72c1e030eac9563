"""Routing in a whole gateway: what a request brings reaches the policy, and what becomes of it teaches the policy."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from gateway_harness import House, house
from http_harness import MODEL, http_house
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually

from branchline.v1 import gateway_pb2
from gateway.pool import Pair
from gateway.routing.policy import Demand, Forecast, block_keys
from gateway.routing.prefix import PrefixAffinity
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

CONTEXT = tuple(range(20, 20 + 80))


def workers(count: int = 3) -> tuple[list[ScriptedPrefill], list[ScriptedDecode]]:
    return [ScriptedPrefill() for _ in range(count)], [ScriptedDecode() for _ in range(count)]


def served(h: House) -> tuple[list[int], list[int]]:
    """Requests of each worker so far."""
    return [len(prefill.requests) for prefill in h.prefills], [len(decode.requests) for decode in h.decodes]


async def ask(h: House, ids: tuple[int, ...], max_tokens: int = 20, **options: str) -> list[int]:
    return (await h.answer(max_tokens, token_ids=gateway_pb2.TokenIds(ids=ids), **options)).token_ids


async def test_a_chat_goes_on_where_it_was(tokens: Tokens) -> None:
    async with house(tokens, *workers(), routing="prefix_affinity") as h:
        policy = h.backend.policy
        assert isinstance(policy, PrefixAffinity)
        for start in (120, 220, 320):  # others spread over idle workers
            await ask(h, tuple(range(start, start + 80)))
        assert served(h)[0] == [1, 1, 1]
        answer = await ask(h, CONTEXT)
        (home,) = [index for index, count in enumerate(served(h)[0]) if count == 2]
        (decode,) = [index for index, d in enumerate(h.decodes) if CONTEXT in [tuple(r.prompt) for r in d.requests]]
        turn = (*CONTEXT, *answer, 7, 7, 7)
        await asyncio.gather(ask(h, (*turn, 1)), ask(h, (*turn, 2)))
        assert served(h)[0][home] == 4
        assert sum(tuple(r.prompt[:80]) == CONTEXT for r in h.decodes[decode].requests) >= 2
        known = policy.index.of(h.backend.pool.workers[3 + decode])
        assert known.match(block_keys((*CONTEXT, *answer), 16)) == 99 // 16, "the answer, too, but its last token"
        h.prefills[home].incarnation = "restarted"
        for worker in h.backend.pool.workers:
            h.backend.pool.suspect(worker)  # asked at once
        await eventually(lambda: {w.status.incarnation for w in h.backend.pool.workers[:3]} == {"p1", "restarted"})
        assert len(policy.index.of(h.backend.pool.workers[home])) == 0
        await h.idle()
        assert not any(worker.waiting_tokens for worker in h.backend.pool.workers)


async def test_a_prefill_worker_is_no_busier_for_what_was_handed_off(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill(slow_s=0.1)], [ScriptedDecode(pace_s=0.05)]) as h:
        prefill, decode = h.backend.pool.workers
        call = asyncio.create_task(ask(h, CONTEXT, 100))
        await eventually(lambda: prefill.waiting_tokens == 80)
        assert (prefill.load, decode.load) == (1, 1)
        await eventually(lambda: not prefill.waiting_tokens)
        await eventually(lambda: (prefill.in_flight, decode.in_flight) == (0, 1))
        call.cancel()
        await h.idle()


async def test_a_session_stays(tokens: Tokens) -> None:
    async with house(tokens, *workers(), routing="session_affinity") as h:
        for name in ("a", "b", "c", "d"):
            before = served(h)
            for turn in range(3):
                await ask(h, (30 + turn,) * 20, session=name)
            gained = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, served(h), strict=True)]
            assert [sorted(side) for side in gained] == [[0, 0, 3], [0, 0, 3]]
        with pytest.raises(grpc.aio.AioRpcError, match="session: at most 1024 characters, got 1025"):
            await ask(h, CONTEXT, session="x" * 1025)


async def test_sessions_over_http(tokens: Tokens) -> None:
    """A header of our own, else what OpenAI's clients send for such purposes, which is never refused."""
    prefills, decodes = workers()
    async with http_house(tokens, prefills, decodes, routing="session_affinity") as h:
        heard: list[str] = []
        policy = h.house.backend.policy
        place = policy.placed

        def placed(pair: Pair, demand: Demand, held_tokens: int) -> Forecast:
            heard.append(demand.session)
            return place(pair, demand, held_tokens)

        policy.placed = placed
        body = {"model": MODEL, "max_tokens": 2}
        chat = {**body, "messages": [{"role": "user", "content": "hello"}]}
        text = {**body, "prompt": ["a", "b"]}
        for path, request, headers in (
            ("/v1/chat/completions", {**chat, "user": "u", "prompt_cache_key": "k"}, {"x-session-id": "s"}),
            ("/v1/chat/completions", {**chat, "user": "u", "prompt_cache_key": "k"}, {}),
            ("/v1/chat/completions", {**chat, "user": "u" * 2000}, {}),
            ("/v1/chat/completions", chat, {}),
            ("/v1/completions", {**text, "user": "u"}, {}),
        ):
            assert (await h.raw.post(path, json=request, headers=headers)).status_code == 200
        assert heard == ["s", "k", "u" * 1024, "", "u", "u"]
