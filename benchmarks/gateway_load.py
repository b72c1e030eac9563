"""Clients of the gateway's benchmark: streams read straight from the source, or through the gateway by gRPC or HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import aiohttp

from benchmarks.gateway_source import AT_ONCE, age_s
from branchline.v1 import decode_pb2, decode_pb2_grpc, gateway_pb2, gateway_pb2_grpc, types_pb2
from branchline.wire.channels import open_channel

TIMEOUT_S = 120.0
#: Messages at a stream's beginning that are not counted: the first comes by way of the prefill worker.
WARM_UP = 2

#: Opens a stream of token ids, one for each message.
Read = Callable[[], AsyncIterator[int]]


@dataclass(frozen=True)
class Load:
    """`streams` at once, of `messages` each, at `rate` messages a second for each, or 0 for as many as come."""

    streams: int
    messages: int
    rate: int = 0

    def scaled(self, streams: float, messages: float) -> Load:
        most = max(1, round(self.streams * streams)), max(2 * WARM_UP, round(self.messages * messages))
        return Load(*most, self.rate)


@dataclass(frozen=True)
class Targets:
    source: str
    grpc: str
    http: str


async def ages(way: str, targets: Targets, load: Load, positions: Mapping[int, int]) -> list[float]:
    """How old each message was when it was read, in seconds. `positions`: of the source's ids.

    Raises RuntimeError when a stream does not bring all of its messages.
    """
    async with _READERS[way](targets, load) as read:
        streams = [_follow(read(), load, positions) for _ in range(load.streams)]
        return [age for stream in await asyncio.gather(*streams) for age in stream]


async def _follow(ids: AsyncIterator[int], load: Load, positions: Mapping[int, int]) -> list[float]:
    found = []
    async for token_id in ids:
        found.append(age_s(positions[token_id], len(positions)))
    if len(found) < load.messages:
        raise RuntimeError(f"a stream brought {len(found)} of {load.messages} messages")
    return found[WARM_UP:]


@contextlib.asynccontextmanager
async def _straight(targets: Targets, load: Load) -> AsyncIterator[Read]:
    async with open_channel(targets.source) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)

        async def read() -> AsyncIterator[int]:
            request = types_pb2.Request(prompt=[1], max_tokens=load.messages)
            request.sampling.seed = load.rate
            asked = decode_pb2.AttachRequest(lease_id=AT_ONCE, request=request)
            async for response in stub.Attach(asked, timeout=TIMEOUT_S):
                for token_id in response.tokens.token_ids:
                    yield token_id

        yield read


@contextlib.asynccontextmanager
async def _grpc(targets: Targets, load: Load) -> AsyncIterator[Read]:
    async with open_channel(targets.grpc) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)

        async def read() -> AsyncIterator[int]:
            request = gateway_pb2.GenerateRequest(max_tokens=load.messages, seed=load.rate, ignore_eos=True)
            request.token_ids.ids.append(1)
            async for response in stub.Generate(request, timeout=TIMEOUT_S):
                for token_id in response.token_ids:
                    yield token_id

        yield read


@contextlib.asynccontextmanager
async def _http(targets: Targets, load: Load) -> AsyncIterator[Read]:
    timeout, connector = aiohttp.ClientTimeout(total=TIMEOUT_S), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://{targets.http}", timeout=timeout, connector=connector) as session:
        body = {"model": "source", "prompt": [1], "max_tokens": load.messages, "seed": load.rate}
        body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}

        async def read() -> AsyncIterator[int]:
            async with session.post("/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            for token_id in choice.get("token_ids") or ():
                                yield token_id

        yield read


_READERS = {"straight": _straight, "grpc": _grpc, "http": _http}
WAYS = tuple(_READERS)
