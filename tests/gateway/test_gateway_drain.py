"""`python -m gateway.drain` beside a gateway that serves."""

from __future__ import annotations

import asyncio

from gateway_harness import house
from scripted_workers import ScriptedDecode, ScriptedPrefill

from gateway import drain
from gateway.tokens import Tokens


async def drained(target: str, timeout_s: float) -> int:
    return await asyncio.to_thread(drain.main, ["--target", target, "--timeout", str(timeout_s), "--settle", "0.1"])


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
