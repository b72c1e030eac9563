"""Servicers for tests that do what a request tells them to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from branchline.core import InvalidRequestError
from branchline.v1 import decode_pb2, decode_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from branchline.wire.frames import read_kv_frame
from branchline.wire.status import RpcFailure

ERRORS = {
    "invalid": InvalidRequestError("max_tokens must be at least 1"),
    "busy": RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "no blocks"),
    "long": RpcFailure(grpc.StatusCode.ABORTED, "x" * 100_000),
    "bug": KeyError("a secret"),
}


class ScriptedGateway(gateway_pb2_grpc.GatewayServiceServicer):  # type: ignore[misc]
    """Generate: one response, then the error named by the prompt, a long wait, or the end."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.closed = asyncio.Event()

    async def Generate(  # noqa: N802
        self, request: gateway_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        try:
            yield gateway_pb2.GenerateResponse(text="first")
            if request.prompt == "abort":
                await context.abort(grpc.StatusCode.NOT_FOUND, "by the handler itself")
            if request.prompt in ERRORS:
                raise ERRORS[request.prompt]
            if request.prompt == "wait":
                self.waiting.set()
                await asyncio.sleep(60)
            if request.prompt == "endless":
                while True:
                    yield gateway_pb2.GenerateResponse(text="more")
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            await asyncio.sleep(0.05)  # cleanup that takes a moment
            self.closed.set()


class ScriptedDecode(decode_pb2_grpc.DecodeServiceServicer):  # type: ignore[misc]
    """Abort raises the error named by the reason; Handoff acknowledges frames. The rest is not implemented."""

    async def Abort(  # noqa: N802
        self, request: decode_pb2.AbortRequest, _: grpc.aio.ServicerContext
    ) -> decode_pb2.AbortResponse:
        if request.reason in ERRORS:
            raise ERRORS[request.reason]
        return decode_pb2.AbortResponse()

    async def Handoff(  # noqa: N802
        self, requests: AsyncIterator[decode_pb2.HandoffRequest], _: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.HandoffResponse]:
        async for request in requests:
            if request.HasField("kv"):
                read_kv_frame(request.kv)
                yield decode_pb2.HandoffResponse(next_index=request.kv.index + 1)
