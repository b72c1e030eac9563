"""A prefill and a decode worker in one process that compute nothing: the source of the gateway's benchmark.

    python -m benchmarks.gateway_source IDS.json

Prints HOST:PORT and serves until its standard input ends. Every token tells when it was sent: it is the one of the ids
in the file at the current tick of the machine's monotonic clock, so whoever reads it knows how long it took. A
request's seed says how many messages a second it gets, each with one token; 0 is as many as fit through.
"""

# ruff: noqa: N802, ARG002 - the methods are named and called by gRPC

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchline.core import Fingerprint
from branchline.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from branchline.wire import convert
from branchline.wire.server import RpcServer

TICK_S = 25e-6
#: Streams at once; more than any case has.
CAPACITY = 1024
_MAX_LENGTH = 1 << 20
_PREFILL_S = 30.0
#: A lease of this name needs no prefill: for a client that reads the source itself.
AT_ONCE = "at once"


def token_now(ids: Sequence[int]) -> int:
    return ids[int(time.monotonic() / TICK_S) % len(ids)]


def age_s(position: int, count: int) -> float:
    """Seconds since the token at this position among `count` was current; right for less than a turn of the clock."""
    return (int(time.monotonic() / TICK_S) - position) % count * TICK_S


@dataclass
class Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Hands off at once: the decode side begins with the same token."""

    ids: Sequence[int]
    firsts: dict[str, asyncio.Future[int]]

    async def Prefill(self, request: Any, context: Any) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        first = token_now(self.ids)
        yield prefill_pb2.PrefillResponse(first_token=prefill_pb2.FirstToken(token_id=first))
        self.firsts[request.lease_id].set_result(first)
        yield prefill_pb2.PrefillResponse(handed_off=prefill_pb2.HandedOff(frames=1))

    async def GetStatus(self, request: Any, context: Any) -> prefill_pb2.PrefillServiceGetStatusResponse:
        return prefill_pb2.PrefillServiceGetStatusResponse(**_status(), blocks_total=CAPACITY)


@dataclass
class Decode(decode_pb2_grpc.DecodeServiceServicer):
    """`firsts`: by lease, the token that prefill sampled."""

    ids: Sequence[int]
    firsts: dict[str, asyncio.Future[int]] = field(default_factory=dict)
    reserved: int = 0

    async def Reserve(self, request: Any, context: Any) -> decode_pb2.ReserveResponse:
        self.reserved += 1
        name = f"lease-{self.reserved}"
        self.firsts[name] = asyncio.get_running_loop().create_future()
        return decode_pb2.ReserveResponse(lease_id=name, ttl_ms=10_000)

    async def Attach(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.AttachResponse]:
        yield decode_pb2.AttachResponse(attached=decode_pb2.Attached())
        token = token_now(self.ids)
        try:
            if request.lease_id != AT_ONCE:
                token = await asyncio.wait_for(self.firsts[request.lease_id], _PREFILL_S)
            rate = request.request.sampling.seed
            begin, speculation = time.monotonic(), types_pb2.Speculation()
            for index in range(request.request.max_tokens):
                if index:
                    if rate:
                        await asyncio.sleep(begin + index / rate - time.monotonic())
                    token = token_now(self.ids)
                speculation.target_forwards = index
                tokens = decode_pb2.Tokens(index=index, token_ids=[token], speculation=speculation)
                yield decode_pb2.AttachResponse(tokens=tokens)
            yield decode_pb2.AttachResponse(finished=decode_pb2.Finished(reason=types_pb2.FINISH_REASON_LENGTH))
        finally:
            self.firsts.pop(request.lease_id, None)

    async def Abort(self, request: Any, context: Any) -> decode_pb2.AbortResponse:
        self.firsts.pop(request.lease_id, None)
        return decode_pb2.AbortResponse()

    async def GetStatus(self, request: Any, context: Any) -> decode_pb2.DecodeServiceGetStatusResponse:
        return decode_pb2.DecodeServiceGetStatusResponse(
            **_status(), blocks_total=CAPACITY, leases=len(self.firsts), max_batch=CAPACITY, tree="none"
        )


def _status() -> dict[str, Any]:
    fingerprint = convert.fingerprint_to_proto(Fingerprint({"model": "source"}))
    return {"incarnation": "source", "fingerprint": fingerprint, "model": "source", "max_model_len": _MAX_LENGTH}


async def serve(ids: Sequence[int]) -> None:
    decode, server = Decode(ids), RpcServer("127.0.0.1", 0)
    prefill = Prefill(ids, decode.firsts)
    server.add("branchline.v1.PrefillService", prefill, prefill_pb2_grpc.add_PrefillServiceServicer_to_server)
    server.add("branchline.v1.DecodeService", decode, decode_pb2_grpc.add_DecodeServiceServicer_to_server)
    print(await server.start(), flush=True)
    try:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes it
    finally:
        await server.stop(0.0)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(Path(sys.argv[1]).read_text())))
