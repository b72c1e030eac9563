"""A gateway with scripted workers behind its HTTP server, and clients for it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
from gateway_harness import House, house
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually

from branchline.wire.http_server import HttpServer
from gateway.http.app import application
from gateway.http.connection import bounded_protocol
from gateway.tokens import Tokens

MODEL = "scripted"


@dataclass
class HttpHouse:
    house: House
    server: HttpServer
    raw: httpx2.AsyncClient
    openai: openai.AsyncOpenAI

    async def post(self, path: str, **body: Any) -> httpx2.Response:
        return await self.raw.post(path, json={"model": MODEL, **body})

    async def refused(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """The status and what is below `error`, which must have OpenAI's shape."""
        return error_of(await self.post(path, **body))

    async def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """All events of a stream, which must end well."""
        async with self.raw.stream("POST", path, json={"model": MODEL, "stream": True, **body}) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            text = (await response.aread()).decode()
        events = text.split("\n\n")
        assert all(event.startswith("data: ") for event in events[:-1])
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    async def idle(self) -> None:
        await self.house.idle(3.0)


def error_of(response: httpx2.Response) -> tuple[int, dict[str, Any]]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return response.status_code, body["error"]


@contextlib.asynccontextmanager
async def http_house(
    tokens: Tokens,
    prefills: Sequence[ScriptedPrefill] | None = None,
    decodes: Sequence[ScriptedDecode] | None = None,
    most: int = 100,
    connections: int = 100,
    **settings: Any,
) -> AsyncIterator[HttpHouse]:
    """`most`: requests at once. In the end nothing may be in use and no connection open."""
    async with house(tokens, prefills or [ScriptedPrefill()], decodes or [ScriptedDecode()], **settings) as h:
        server = HttpServer(application(h.desk, most), "127.0.0.1", 0, protocol=bounded_protocol(connections))
        url = f"http://{await server.start()}"
        try:
            async with (
                httpx2.AsyncClient(base_url=url, timeout=20, trust_env=False) as raw,
                openai.DefaultAsyncHttpxClient(timeout=20, trust_env=False) as transport,
                openai.AsyncOpenAI(
                    base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=transport
                ) as client,
            ):
                yield HttpHouse(h, server, raw, client)
            await h.idle(3.0)
            await eventually(lambda: not server.connections, 5.0)
        finally:
            await server.stop()
