"""`python -m gateway.drain` beside a gateway that serves."""

from __future__ import annotations

import asyncio

from gateway_harness import house
from http_harness import http_house
from scripted_workers import ScriptedDecode, ScriptedPrefill

from gateway import drain
from gateway.tokens import Tokens


async def drained(target: str, timeout_s: float) -> int:
    return await asyncio.to_thread(drain.main, ["--target", target, "--timeout", str(timeout_s), "--settle", "0.1"])


async def test_it_reads_metrics_where_it_may_ask_nothing_else(tokens: Tokens) -> None:
    async with http_house(tokens, decodes=[ScriptedDecode(pace_s=0.05)]) as h:
        url = f"{h.raw.base_url}/metrics"

        async def looked(timeout_s: float) -> int:
            return await asyncio.to_thread(drain.main, ["--metrics", url, "--timeout", str(timeout_s)])

        assert await looked(5) == 0
        answering = asyncio.create_task(h.house.answer(max_tokens=30))
        while not h.house.desk.door.active_requests:
            await asyncio.sleep(0.01)
        assert await looked(0.3) == 1
        assert await looked(20) == 0
        assert not h.house.desk.door.active_requests
        await answering
        wrong = ["--metrics", f"{h.raw.base_url}/nothing", "--timeout", "0.2"]
        assert await asyncio.to_thread(drain.main, wrong) == 1, "who says nothing is given the whole time"
    assert await looked(5) == 0, "nobody is there to wait for"


async def test_it_waits_for_running_requests_and_not_longer_than_told(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(pace_s=0.05)]) as h:
        assert await drained(h.target, 5) == 0
        answering = asyncio.create_task(h.answer(max_tokens=30))
        while not h.desk.door.active_requests:
            await asyncio.sleep(0.01)
        assert await drained(h.target, 0.3) == 1
        assert not answering.done()
        assert await drained(h.target, 20) == 0
        assert not h.desk.door.active_requests
        await answering
        await h.idle()
    assert await drained(h.target, 5) == 0, "nobody is there to wait for"
