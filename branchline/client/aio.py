"""The asyncio client. One instance belongs to one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, Unpack

import grpc

from branchline.client import transport
from branchline.client.chat import ChatChunk, ChatCollector, ChatCompletion, ChatOptions, chat_request
from branchline.client.collect import ChunkT, Collector, Collects, ResultT
from branchline.client.errors import (
    BranchlineError,
    CancelledError,
    DeadlineExceededError,
    UnavailableError,
    from_rpc_error,
)
from branchline.client.options import DEFAULT_TIMEOUT_S, GenerateOptions, deadline, generate_request
from branchline.client.results import (
    Chunk,
    Completion,
    GatewayStatus,
    Model,
    ServerInfo,
    gateway_status,
    models,
    server_info,
)
from branchline.client.tls import Keyed, Tls, check_key
from branchline.client.values import ids_value, text_value
from branchline.v1 import gateway_pb2, gateway_pb2_grpc


class AsyncClient:
    """A connection to a gateway:

        async with AsyncClient("127.0.0.1:50051") as client:
            async for chunk in client.generate(prompt="Once upon a time", max_tokens=64):
                print(chunk.text, end="", flush=True)

    It connects with its first call. `timeout` is the deadline in seconds of calls that bring none. The `traceparent` of
    a call is a W3C trace context: the gateway's spans then belong to the caller's trace.
    `api_key` is what a gateway with keys asks for; without `tls` it goes over the network for everybody to read.
    Calls raise the exceptions of `branchline.client.errors`.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.target = transport.check_target(target)
        self._timeout_s = deadline(timeout)
        self._api_key = check_key(api_key)
        self._options = transport.channel_options(target)
        self._credentials: Any = None
        if tls is not None:
            self._credentials = tls.credentials()
            self._options = [*self._options, *tls.options]
        self._channel: Any = None  # made by the first call, on the loop that runs then
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what still runs and disconnects. Idempotent."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def complete(
        self, *, timeout: float | None = None, traceparent: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Generates and waits for the end, at most `timeout` seconds. Options: see GenerateOptions."""
        async with self.generate(timeout=timeout, traceparent=traceparent, **options) as stream:
            async for _ in stream:
                pass
            return stream.result

    def generate(
        self, *, timeout: float | None = None, traceparent: str | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream[Chunk, Completion]:
        """Generates and yields the parts as they come, for `timeout` seconds. Options: see GenerateOptions."""
        timeout_s = self._timeout_s if timeout is None else deadline(timeout)
        request, metadata = generate_request(**options), transport.trace_metadata(traceparent)
        call = self._stub().Generate(request, timeout=timeout_s, metadata=metadata)
        return AsyncStream(call, Collector(max(1, request.n)), self.target)

    async def complete_chat(
        self, *, timeout: float | None = None, traceparent: str | None = None, **options: Unpack[ChatOptions]
    ) -> ChatCompletion:
        """Answers a chat and waits for the end, at most `timeout` seconds. Options: see ChatOptions."""
        async with self.chat(timeout=timeout, traceparent=traceparent, **options) as stream:
            async for _ in stream:
                pass
            return stream.result

    def chat(
        self, *, timeout: float | None = None, traceparent: str | None = None, **options: Unpack[ChatOptions]
    ) -> AsyncStream[ChatChunk, ChatCompletion]:
        """Answers a chat and yields the parts as they come: content, reasoning, calls. Options: see ChatOptions."""
        timeout_s = self._timeout_s if timeout is None else deadline(timeout)
        request, metadata = chat_request(**options), transport.trace_metadata(traceparent)
        collector = ChatCollector(max(1, request.options.n))
        return AsyncStream(self._stub().Chat(request, timeout=timeout_s, metadata=metadata), collector, self.target)

    async def tokenize(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        timeout: float = transport.CALL_TIMEOUT_S,
    ) -> tuple[int, ...]:
        """The token ids of a prompt, or of a chat with the model's template applied."""
        request = transport.tokenize_request(prompt, messages, tools)
        stub = self._stub()
        with _mapped_errors(self.target):
            return tuple((await stub.Tokenize(request, timeout=deadline(timeout))).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, special_tokens: bool = False, timeout: float = transport.CALL_TIMEOUT_S
    ) -> str:
        """The text of token ids; with `special_tokens` shown by their names."""
        ids = ids_value("token_ids", token_ids)
        request = gateway_pb2.DetokenizeRequest(token_ids=ids, special_tokens=special_tokens)
        stub = self._stub()
        with _mapped_errors(self.target):
            text: str = (await stub.Detokenize(request, timeout=deadline(timeout))).text
            return text

    async def models(self, *, timeout: float = transport.CALL_TIMEOUT_S) -> tuple[Model, ...]:
        """The models that are served."""
        stub = self._stub()
        with _mapped_errors(self.target):
            return models(await stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=deadline(timeout)))

    async def status(self, *, timeout: float = transport.CALL_TIMEOUT_S) -> GatewayStatus:
        """The requests that the gateway is serving now, by whichever interface they came."""
        stub = self._stub()
        with _mapped_errors(self.target):
            return gateway_status(await stub.GetStatus(gateway_pb2.GetStatusRequest(), timeout=deadline(timeout)))

    async def abort(self, request_id: str, *, reason: str = "", timeout: float = transport.CALL_TIMEOUT_S) -> None:
        """Ends a request that the gateway is serving; its client gets CancelledError. Raises InvalidRequestError when
        there is no such request, or no more.
        """
        request = gateway_pb2.GatewayServiceAbortRequest(
            request_id=text_value("request_id", request_id), reason=text_value("reason", reason)
        )
        stub = self._stub()
        with _mapped_errors(self.target):
            await stub.Abort(request, timeout=deadline(timeout))

    async def info(self, *, timeout: float = 10.0) -> ServerInfo:
        """What is being served, and the load now."""
        stub = self._stub()
        with _mapped_errors(self.target):
            return server_info(await stub.GetInfo(gateway_pb2.GetInfoRequest(), timeout=deadline(timeout)))

    async def health(self, *, timeout: float = transport.HEALTH_TIMEOUT_S) -> bool:
        """Whether the gateway can serve; False also when nobody answers within `timeout` seconds."""
        check = self._open_channel().unary_unary(transport.HEALTH_METHOD)
        try:
            with _mapped_errors(self.target):
                answer: bytes = await check(transport.HEALTH_REQUEST, timeout=deadline(timeout))
        except (UnavailableError, DeadlineExceededError):
            return False
        return answer == transport.HEALTH_SERVING

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Waits until the gateway can serve. Raises DeadlineExceededError after `timeout` seconds."""
        wait = transport.ReadyWait(self.target, deadline(timeout))
        while not await self.health(timeout=wait.next_timeout_s()):
            await asyncio.sleep(transport.POLL_S)

    def _stub(self) -> Any:
        channel = self._open_channel()
        return gateway_pb2_grpc.GatewayServiceStub(Keyed(channel, self._api_key) if self._api_key else channel)

    def _open_channel(self) -> Any:
        if self._closed:
            raise BranchlineError("the client is closed", "CANCELLED")
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, options=self._options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, options=self._options)
        return self._channel


class AsyncStream(Generic[ChunkT, ResultT]):
    """A running generation: an asynchronous iterator of chunks which knows the whole result after its end.

    It is cancelled, and everything it holds on the workers is freed, by `close()`, by leaving its `async with`
    block, by cancelling the task that waits for it, or when the last reference to it goes.
    """

    def __init__(self, call: Any, collector: Collects[ChunkT, ResultT], target: str) -> None:
        """`call`: gRPC's, which has been made."""
        self._target = target
        self._collector = collector
        self._call = call

    def __aiter__(self) -> AsyncIterator[ChunkT]:
        return self

    async def __anext__(self) -> ChunkT:
        while True:
            with _mapped_errors(self._target):
                response = await self._call.read()
            if response is grpc.aio.EOF:
                self._collector.finish()
                raise StopAsyncIteration
            chunk = self._collector.add(response)
            if chunk is not None:
                return chunk

    @property
    def result(self) -> ResultT:
        """All of it together. Raises RuntimeError before the stream has ended."""
        result = self._collector.result
        if result is None:
            raise RuntimeError("the stream has not come to its end")
        return result

    async def request_id(self) -> str:
        """What `abort` and `status` call it. Waits until the gateway has read the request."""
        with _mapped_errors(self._target):
            return transport.request_id(await self._call.initial_metadata())

    async def close(self) -> None:
        """Cancels the generation unless it has ended. Idempotent."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # absent when the call could not be made
            self._call.cancel()


@contextlib.contextmanager
def _mapped_errors(target: str) -> Iterator[None]:
    """Around an await of gRPC's. A call that somebody else cancels ends for gRPC as if this task had been cancelled;
    its caller must not believe that.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CancelledError("the call or its client was closed", "CANCELLED") from None
