"""What many, silent and slow HTTP connections get."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from http_harness import error_of, http_house
from scripted_workers import ScriptedDecode, eventually

from gateway.http import connection
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

HEAD = b"GET /version HTTP/1.1\r\nhost: x\r\n"


async def opened(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def parsed(answer: bytes) -> tuple[int, dict[str, str]]:
    """Status and error of an answer that ends its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]


async def test_connections_are_bounded(tokens: Tokens) -> None:
    async with http_house(tokens, connections=3) as h:
        address = h.raw.base_url.netloc.decode()
        held = [await opened(address) for _ in range(3)]
        await eventually(lambda: h.server.connections == 3)
        reader, writer = await opened(address)
        writer.write(HEAD + b"\r\n")
        status, error = parsed(await asyncio.wait_for(reader.read(), 5))
        assert (status, error["code"]) == (503, "service_unavailable")
        assert "3 HTTP connections" in error["message"]
        silent, _ = await opened(address)
        assert parsed(await asyncio.wait_for(silent.read(), 5))[0] == 503
        for _, writer in held:
            writer.close()
        await eventually(lambda: h.server.connections == 0)
        assert (await h.raw.get("/version")).status_code == 200


async def test_headers_have_a_deadline(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_TIMEOUT_S", 1.0)
    async with http_house(tokens) as h:
        address = h.raw.base_url.netloc.decode()
        silent, _ = await opened(address)
        slow, writer = await opened(address)
        began = time.monotonic()
        answer = asyncio.create_task(slow.read())
        for byte in HEAD + b"x-long: " + b"x" * 200:  # a byte now and then holds nothing open
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
            if answer.done():
                break
        assert parsed(await answer) == (
            408,
            {**parsed(await answer)[1], "message": "The request's headers did not come in time."},
        )
        assert 0.9 < time.monotonic() - began < 10
        assert await asyncio.wait_for(silent.read(), 5) == b""

        # The second request on a connection has as long, and an answer may take longer than that.
        reader, writer = await opened(address)
        writer.write(HEAD + b"\r\n" + HEAD)
        text = await asyncio.wait_for(reader.read(), 5)
        assert text.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 408" in text
        h.house.decodes[0].pace_s = 0.15
        body = {"prompt": "a", "max_tokens": 10, "ignore_eos": True}
        assert (await h.post("/v1/completions", **body)).status_code == 200


async def test_requests_are_bounded(tokens: Tokens) -> None:
    async with http_house(tokens, decodes=[ScriptedDecode(pace_s=0.05)], most=2) as h:
        tasks = [asyncio.create_task(h.post("/v1/completions", prompt="a", max_tokens=100)) for _ in range(2)]
        await eventually(lambda: len(h.house.decodes[0].leases) == 2)
        response = await h.post("/v1/completions", prompt="a", max_tokens=1)
        status, error = error_of(response)
        assert (status, error["code"], response.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        assert (await h.raw.get("/health")).status_code == 200
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await h.idle()
        assert (await h.post("/v1/completions", prompt="a", max_tokens=1)).status_code == 200


async def test_what_is_no_http(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        reader, writer = await opened(h.raw.base_url.netloc.decode())
        writer.write(b"\x16\x03\x01 what a TLS client says\r\n\r\n")
        assert parsed(await asyncio.wait_for(reader.read(), 5))[0] == 400
