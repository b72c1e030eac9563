"""One HTTP request and its answer: a JSON body in; a JSON body, or a stream of events, out."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from branchline.core import InvalidRequestError
from branchline.observe.logs import about
from branchline.wire.channels import MAX_MESSAGE_BYTES
from branchline.wire.status import RpcFailure
from gateway.background import cancel_all
from gateway.desk import Desk
from gateway.door import Call, Guest
from gateway.http.errors import CLIENT_CLOSED, HttpError, from_failure, from_validation

logger = logging.getLogger(__name__)

#: Of a body, as of a message over gRPC.
MAX_BODY_BYTES = MAX_MESSAGE_BYTES
#: Times that size after which nothing more is read.
_MOST_READ = 4
#: Seconds that a client may take to send a body.
BODY_TIMEOUT_S = 30.0

Body = TypeVar("Body", bound=BaseModel)


class Exchange:
    """`request_id`, once set, is told in the header `x-request-id`."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, ended: Callable[[str, grpc.StatusCode], None]
    ) -> None:
        """`ended` is told once how it ended, before the client knows."""
        self._ended = ended
        self._settled = False
        self.request_id = ""
        self.headers = Headers(scope=scope)
        self._path: str = scope["path"]
        self._receive = receive
        self._send = send
        self._streaming = False
        self._answered = False

    @property
    def call(self) -> Call:
        return Call("http", self._path, dict(self.headers))

    async def body(self, schema: type[Body]) -> Body:
        """Raises HttpError for one that is too long, too slow or not what the schema says."""
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                data = await self._read()
        except TimeoutError:
            raise HttpError(408, "The body did not come in time.") from None
        try:
            return schema.model_validate_json(data)
        except ValidationError as error:
            raise from_validation(error) from None

    async def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """The whole answer, as JSON."""
        self.settle(grpc.StatusCode.OK)
        await self._start(status, {"content-type": "application/json", "content-length": str(len(body))}, headers)
        await self._send({"type": "http.response.body", "body": body})

    async def event(self, data: str) -> None:
        """One event of a stream of them; the first begins the answer. Waits while the client reads slower."""
        if not self._streaming:
            self._streaming = True
            # Not cached, and not buffered by proxies that know the header.
            headers = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}
            await self._start(200, headers, {"cache-control": "no-cache"})
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    async def end_events(self) -> None:
        self.settle(grpc.StatusCode.OK)
        await self.event("[DONE]")
        await self._send({"type": "http.response.body", "body": b""})

    async def run(self, work: Awaitable[None]) -> None:
        """Runs it until it ends or the client has gone, which cancels it; its errors become the answer."""
        task, watch = asyncio.ensure_future(self._guarded(work)), asyncio.create_task(self._gone())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all({task, watch})

    async def _guarded(self, work: Awaitable[None]) -> None:
        try:
            try:
                await work
            except (RpcFailure, InvalidRequestError) as error:
                raise from_failure(error) from error
        except HttpError as error:
            await self.fail(error)
        except Exception:
            name = self.request_id or secrets.token_hex(6)
            logger.exception("%s failed", self._path, extra=about(name))
            await self.fail(HttpError(500, f"internal error, request {name}"))

    async def fail(self, error: HttpError) -> None:
        """An error as the answer, or as the last event of one that has begun."""
        self.settle(error.grpc_code)
        body = json.dumps(error.body, ensure_ascii=False)
        if self._streaming:
            await self.event(body)
            await self.end_events()
        elif not self._answered:
            await self.answer(error.status, body.encode(), error.headers)

    def settle(self, code: grpc.StatusCode) -> None:
        """How it ended; only the first call counts."""
        if not self._settled:
            self._settled = True
            self._ended("http", code)

    async def _read(self) -> bytes:
        if self.headers.get("content-encoding", "identity") != "identity":
            raise HttpError(415, "The body must not be compressed.")
        length = self.headers.get("content-length", "0")  # the server has refused what is no number
        if int(length) > MAX_BODY_BYTES and "expect" in self.headers:  # it is not on its way yet
            raise _too_long()
        data, size, more = bytearray(), 0, True
        # What is too long is read a while and dropped: a client that still writes does not see an answer.
        while more and size <= _MOST_READ * MAX_BODY_BYTES:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise HttpError(CLIENT_CLOSED, "The client has gone.")
            more = message.get("more_body", False)
            size += len(message.get("body", b""))
            if size <= MAX_BODY_BYTES:
                data += message.get("body", b"")
        if size > MAX_BODY_BYTES:
            raise _too_long()
        return bytes(data)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _start(self, status: int, headers: Mapping[str, str], more: Mapping[str, str] | None) -> None:
        assert not self._answered
        self._answered = True
        named = {"x-request-id": self.request_id} if self.request_id else {}
        pairs = [(name.encode(), value.encode()) for name, value in {**headers, **(more or {}), **named}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


class PostJson:
    """An ASGI application: greeted at the door, a body of the schema read, handled, answered."""

    def __init__(
        self, desk: Desk, schema: type[Body], handle: Callable[[Exchange, Guest, Body], Awaitable[None]]
    ) -> None:
        self._desk = desk
        self._schema: Any = schema
        self._handle: Callable[[Exchange, Guest, Any], Awaitable[None]] = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._desk.counts.ended)
        try:
            guest = self._desk.door.greet(exchange.call)
            body = await exchange.body(self._schema)
        except RpcFailure as error:
            await exchange.fail(from_failure(error))
        except HttpError as error:
            await exchange.fail(error)
        else:
            await exchange.run(self._handle(exchange, guest, body))
        finally:  # whatever has no other end
            exchange.settle(grpc.StatusCode.CANCELLED)


def _too_long() -> HttpError:
    # The rest of the body is not read, so that the connection is of no more use.
    return HttpError(413, f"The body is longer than {MAX_BODY_BYTES} bytes.", headers={"connection": "close"})
