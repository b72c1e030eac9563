"""The gateway's gRPC service."""

# ruff: noqa: N802, ARG002 - the methods are named and called by gRPC

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2, gateway_pb2_grpc
from branchline.wire.server import RpcServer
from gateway.desk import Desk
from gateway.door import Call, Guest
from gateway.generation import Ask
from gateway.limits import check_ids
from gateway.prompts import text_ids

SERVICE = "branchline.v1.GatewayService"

#: In the initial metadata of calls that generate.
REQUEST_ID_METADATA = "x-request-id"

#: The RPCs that count as requests.
_GENERATING = ("Generate", "Chat")

#: Who calls. gRPC handles each call in a task, and so in a context, of its own.
_guest: contextvars.ContextVar[Guest] = contextvars.ContextVar("guest")


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """Translates between gRPC and the desk; the methods' names are the proto's."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def add_to(self, server: RpcServer) -> None:
        """With its guard, without which it would not know its guests."""
        add: Callable[[Any, Any], None] = gateway_pb2_grpc.add_GatewayServiceServicer_to_server
        server.add(SERVICE, self, add, guard=self._greet, ended=self._ended)

    async def Generate(self, request: gateway_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async def write(_prompt: int, response: gateway_pb2.GenerateResponse) -> None:
            await context.write(response)

        model = self._desk.model(request.model)
        async with model.generator.open(self._guest) as session:
            (prompt,) = await session.read([Ask(request)])
            await _send_id(context, session.request_id, prompt)
            await session.run(write)

    async def Chat(self, request: gateway_pb2.ChatRequest, context: grpc.aio.ServicerContext) -> None:
        chats = self._desk.model(request.options.model).chats
        await chats.run(self._guest, request, context.write, started=functools.partial(_send_id, context))

    async def Tokenize(
        self, request: gateway_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> gateway_pb2.TokenizeResponse:
        model = self._desk.model(request.model or request.chat.options.model)
        limits = model.generator.limits
        match request.WhichOneof("input"):
            case "prompt":
                ids = await text_ids(request.prompt, model.tokens, limits)
            case "chat":
                ask = model.chats.ask(request.chat)
                assert ask.chat
                ids = await model.tokens.encode_chat(ask.chat)
            case _:
                raise InvalidRequestError("input: one of prompt and chat must be given")
        return gateway_pb2.TokenizeResponse(token_ids=ids, max_model_len=limits.max_model_len)

    async def Detokenize(
        self, request: gateway_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> gateway_pb2.DetokenizeResponse:
        model, ids = self._desk.model(request.model), list(request.token_ids)
        tokens, most = model.tokens, model.generator.limits.max_model_len
        if len(ids) > most:
            raise InvalidRequestError(f"token_ids: {len(ids)} are more than the context limit of {most}")
        check_ids("token_ids", ids, tokens.vocab_size)
        return gateway_pb2.DetokenizeResponse(
            text=tokens.decode_all(ids) if request.special_tokens else tokens.decode(ids)
        )

    async def GetInfo(
        self,
        request: gateway_pb2.GetInfoRequest,
        context: grpc.aio.ServicerContext,
    ) -> gateway_pb2.GetInfoResponse:
        return await self._desk.info.system()

    async def ListModels(
        self,
        request: gateway_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext,
    ) -> gateway_pb2.ListModelsResponse:
        return gateway_pb2.ListModelsResponse(models=[model.as_proto() for model in self._desk.models])

    async def GetStatus(
        self,
        request: gateway_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext,
    ) -> gateway_pb2.GetStatusResponse:
        return self._desk.info.status(self._guest)

    async def Abort(
        self, request: gateway_pb2.GatewayServiceAbortRequest, context: grpc.aio.ServicerContext
    ) -> gateway_pb2.GatewayServiceAbortResponse:
        self._desk.door.abort(self._guest, request.request_id, request.reason or "no reason was given")
        return gateway_pb2.GatewayServiceAbortResponse()

    def _greet(self, method: str, context: grpc.aio.ServicerContext) -> None:
        """Before the request is parsed, which costs. Raises RpcFailure."""
        headers: dict[str, Any] = dict(context.invocation_metadata() or ())
        _guest.set(self._desk.door.greet(Call("grpc", method, headers, context.time_remaining())))

    def _ended(self, method: str, code: grpc.StatusCode) -> None:
        if method in _GENERATING:
            self._desk.counts.ended("grpc", code)

    @property
    def _guest(self) -> Guest:
        """Of the call that is being handled."""
        return _guest.get()


async def _send_id(context: grpc.aio.ServicerContext, request_id: str, _prompt: Sequence[int]) -> None:
    """Before the first response, so that a client that waits in the queue can name its request."""
    await context.send_initial_metadata(((REQUEST_ID_METADATA, request_id),))
