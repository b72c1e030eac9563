"""What stands between gRPC and every handler: request parsing, error mapping, and the count of running calls.

One interceptor instead of a try in every method. Handlers are coroutines, or asynchronous generators when they
stream; they raise (`branchline.wire.status`) and never see gRPC's own ways of reporting an error. They clean up
in `finally`: a cancelled call raises CancelledError at an `await`, but GeneratorExit at a `yield`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import secrets
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from branchline.core import InvalidRequestError
from branchline.wire.status import FORESEEN, RETRY_METADATA, RpcFailure, failure_for

logger = logging.getLogger(__name__)

#: Called with a method's name and the call's context before anything of a request is parsed; raises to refuse the call.
#: It runs in the handler's own task, so that what it sets in a context variable is there in the handler.
Guard = Callable[[str, grpc.aio.ServicerContext], None]

#: Called with a method's name and the status of each call as it ends, whatever ended it.
Ended = Callable[[str, grpc.StatusCode], None]

#: Served by gRPC's own servicers; a Watch lasts as long as the peer likes, so it must not count as work.
_INFRASTRUCTURE = ("/grpc.health.", "/grpc.reflection.")


class CallCounter:
    """How many handlers are running, a way to wait until none is, and a gate that keeps new ones out."""

    def __init__(self) -> None:
        self.running = 0
        self.refusing = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        if self.refusing:
            raise RpcFailure(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if self.running == 0:
                self._idle.set()

    def refuse(self) -> None:
        """New calls fail with UNAVAILABLE from now on."""
        self.refusing = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """True when no handler runs, False when `timeout_s` passed first."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


class HandlerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no stubs
    """Wraps every handler of Branchline's services. `parsers`: by method, in place of the generated ones; `guards`
    and `ended`: by service.
    """

    def __init__(
        self,
        counter: CallCounter,
        parsers: Mapping[str, Callable[[bytes], Any]],
        guards: Mapping[str, Guard] = types.MappingProxyType({}),
        ended: Mapping[str, Ended] = types.MappingProxyType({}),
    ) -> None:
        self._counter = counter
        self._parsers = parsers
        self._guards = guards
        self._ended = ended

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(_INFRASTRUCTURE):
            return handler
        deserialize = self._parsers.get(method, handler.request_deserializer)
        service = method.split("/")[1]
        guard, ended = self._guards.get(service, _everybody), self._ended.get(service, _nobody_asks)
        return _wrap(handler, method, self._counter, deserialize, guard, ended)


def _everybody(_method: str, _context: grpc.aio.ServicerContext) -> None:
    pass


def _nobody_asks(_method: str, _code: grpc.StatusCode) -> None:
    pass


def _wrap(
    handler: Any,
    method: str,
    counter: CallCounter,
    deserialize: Callable[[bytes], Any],
    guard: Guard,
    ended: Ended,
) -> Any:
    """The same method with parsing and error mapping around it.

    gRPC parses a single request before it calls the handler and answers UNKNOWN when that fails; so it is given
    none to parse (`request_deserializer=None` hands over the bytes) and the parsing is done here. Messages of
    a request stream are parsed when the handler asks for the next one, so an error is raised inside the handler.
    """
    parse = _parser(deserialize, method)
    if handler.request_streaming:
        kind = "stream_stream" if handler.response_streaming else "stream_unary"
    else:
        kind = "unary_stream" if handler.response_streaming else "unary_unary"
    behaviour = getattr(handler, kind)
    name = method.rpartition("/")[2]

    async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with _mapped_errors(method, context, ended):
            with counter.track():
                guard(name, context)
                return await behaviour(request if handler.request_streaming else parse(request), context)

    async def streaming(request: Any, context: grpc.aio.ServicerContext) -> None:
        # gRPC leaves a cancelled generator to the garbage collector. Closed here, its `finally` blocks (leases,
        # streams to other workers) have run when the call has ended.
        async with _mapped_errors(method, context, ended):
            with counter.track():
                guard(name, context)
                responses = behaviour(request if handler.request_streaming else parse(request), context)
                if inspect.isawaitable(responses):  # a coroutine that writes to the context itself
                    await responses
                    return
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        await context.write(response)

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        streaming if handler.response_streaming else unary,
        request_deserializer=parse if handler.request_streaming else None,
        response_serializer=handler.response_serializer,
    )


def _parser(deserialize: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            raise InvalidRequestError(
                f"the request to {method} is not a valid message: it is damaged, or a string in it is not UTF-8"
            ) from None

    return parse


@contextlib.asynccontextmanager
async def _mapped_errors(method: str, context: grpc.aio.ServicerContext, ended: Ended) -> AsyncGenerator[None]:
    """Ends the call with the status that the error inside maps to. Cancellation passes through untouched."""
    code = grpc.StatusCode.CANCELLED
    try:
        yield
        code = grpc.StatusCode.OK
        return
    except FORESEEN as error:
        failure = failure_for(error)
        code = failure.code
    except Exception:
        request_id = secrets.token_hex(6)
        logger.exception("%s failed", method, extra={"request_id": request_id})
        failure = RpcFailure(grpc.StatusCode.INTERNAL, f"internal error, request {request_id}")
        code = failure.code
    finally:  # before the client hears of it
        ended(method.rpartition("/")[2], code)
    # A negative number means, as in gRPC's own design of retries (gRFC A6), that trying again is of no use.
    pushback_ms = -1 if failure.retry_after_s is None else math.ceil(failure.retry_after_s * 1000)
    await context.abort(failure.code, failure.details, ((RETRY_METADATA, str(pushback_ms)),))
