"""A road between prefill and decode on which a message is damaged or the stream breaks, once."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from branchline.v1 import decode_pb2, decode_pb2_grpc
from branchline.wire.channels import open_channel
from branchline.wire.server import RpcServer
from branchline.wire.status import RpcFailure


class BadRoad(decode_pb2_grpc.DecodeServiceServicer):
    """Passes Handoff on to a real decode worker. `accident` befalls the message number `at` of the first stream:
    "damage" flips a bit, "break" ends the stream, "silence" swallows it and all that follow."""

    def __init__(self, decode: Any, accident: str, at: int) -> None:
        self._decode = decode
        self._accident = accident
        self._at = at
        self.streams = 0

    async def Handoff(  # noqa: N802
        self, requests: AsyncIterator[decode_pb2.HandoffRequest], _: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.HandoffResponse]:
        self.streams += 1
        broken = False

        async def passed_on() -> AsyncIterator[decode_pb2.HandoffRequest]:
            nonlocal broken
            number = 0
            async for request in requests:
                if self.streams == 1 and number == self._at:
                    if self._accident == "break":
                        broken = True
                        return
                    if self._accident == "silence":
                        continue
                    assert request.WhichOneof("part") == "kv"
                    request.kv.data = bytes([request.kv.data[0] ^ 1]) + request.kv.data[1:]
                number += 1
                yield request

        call = self._decode.Handoff(passed_on(), timeout=20)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise RpcFailure(error.code(), error.details() or "") from None
        finally:
            call.cancel()
        if broken:
            raise RpcFailure(grpc.StatusCode.UNAVAILABLE, "the road is broken")


@contextlib.asynccontextmanager
async def bad_road(decode_address: str, accident: str, at: int) -> AsyncIterator[tuple[str, BadRoad]]:
    """The road's own address, to be used in place of the decode worker's, and its servicer."""
    async with open_channel(decode_address) as channel:
        servicer = BadRoad(decode_pb2_grpc.DecodeServiceStub(channel), accident, at)
        server = RpcServer("127.0.0.1", 0)
        server.add("branchline.v1.DecodeService", servicer, decode_pb2_grpc.add_DecodeServiceServicer_to_server)
        yield await server.start(), servicer
        await server.stop(0)
