"""The synchronous client. Safe to share between threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, Unpack

import grpc

from branchline.client import transport
from branchline.client.chat import ChatChunk, ChatCollector, ChatCompletion, ChatOptions, chat_request
from branchline.client.collect import ChunkT, Collector, Collects, ResultT
from branchline.client.errors import BranchlineError, DeadlineExceededError, UnavailableError, from_rpc_error
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


class Client:
    """A connection to a gateway:

        with Client("127.0.0.1:50051") as client:
            print(client.complete(prompt="The capital of France is", max_tokens=16).text)

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
        key, options = check_key(api_key), transport.channel_options(target)
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, tls.credentials(), options=[*options, *tls.options])
        self._stub = gateway_pb2_grpc.GatewayServiceStub(Keyed(self._channel, key) if key else self._channel)
        self._check_health = self._channel.unary_unary(transport.HEALTH_METHOD)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs and disconnects. Idempotent."""
        self._closed = True
        self._channel.close()

    def complete(
        self, *, timeout: float | None = None, traceparent: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Generates and waits for the end, at most `timeout` seconds. Options: see GenerateOptions."""
        with self.generate(timeout=timeout, traceparent=traceparent, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def generate(
        self, *, timeout: float | None = None, traceparent: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Stream[Chunk, Completion]:
        """Generates and yields the parts as they come, for `timeout` seconds. Options: see GenerateOptions."""
        timeout_s = self._timeout_s if timeout is None else deadline(timeout)
        request, metadata = generate_request(**options), transport.trace_metadata(traceparent)
        self._require_open()
        call = self._stub.Generate(request, timeout=timeout_s, metadata=metadata)
        return Stream(call, Collector(max(1, request.n)), self.target)

    def complete_chat(
        self, *, timeout: float | None = None, traceparent: str | None = None, **options: Unpack[ChatOptions]
    ) -> ChatCompletion:
        """Answers a chat and waits for the end, at most `timeout` seconds. Options: see ChatOptions."""
        with self.chat(timeout=timeout, traceparent=traceparent, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def chat(
        self, *, timeout: float | None = None, traceparent: str | None = None, **options: Unpack[ChatOptions]
    ) -> Stream[ChatChunk, ChatCompletion]:
        """Answers a chat and yields the parts as they come: content, reasoning, calls. Options: see ChatOptions."""
        timeout_s = self._timeout_s if timeout is None else deadline(timeout)
        request, metadata = chat_request(**options), transport.trace_metadata(traceparent)
        collector = ChatCollector(max(1, request.options.n))
        self._require_open()
        return Stream(self._stub.Chat(request, timeout=timeout_s, metadata=metadata), collector, self.target)

    def tokenize(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        timeout: float = transport.CALL_TIMEOUT_S,
    ) -> tuple[int, ...]:
        """The token ids of a prompt, or of a chat with the model's template applied."""
        request = transport.tokenize_request(prompt, messages, tools)
        self._require_open()
        with _mapped_errors(self.target):
            return tuple((self._stub.Tokenize(request, timeout=deadline(timeout))).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, special_tokens: bool = False, timeout: float = transport.CALL_TIMEOUT_S
    ) -> str:
        """The text of token ids; with `special_tokens` shown by their names."""
        ids = ids_value("token_ids", token_ids)
        request = gateway_pb2.DetokenizeRequest(token_ids=ids, special_tokens=special_tokens)
        self._require_open()
        with _mapped_errors(self.target):
            text: str = (self._stub.Detokenize(request, timeout=deadline(timeout))).text
            return text

    def models(self, *, timeout: float = transport.CALL_TIMEOUT_S) -> tuple[Model, ...]:
        """The models that are served."""
        self._require_open()
        with _mapped_errors(self.target):
            return models(self._stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=deadline(timeout)))

    def status(self, *, timeout: float = transport.CALL_TIMEOUT_S) -> GatewayStatus:
        """The requests that the gateway is serving now, by whichever interface they came."""
        self._require_open()
        with _mapped_errors(self.target):
            return gateway_status(self._stub.GetStatus(gateway_pb2.GetStatusRequest(), timeout=deadline(timeout)))

    def abort(self, request_id: str, *, reason: str = "", timeout: float = transport.CALL_TIMEOUT_S) -> None:
        """Ends a request that the gateway is serving; its client gets CancelledError. Raises InvalidRequestError when
        there is no such request, or no more.
        """
        request = gateway_pb2.GatewayServiceAbortRequest(
            request_id=text_value("request_id", request_id), reason=text_value("reason", reason)
        )
        self._require_open()
        with _mapped_errors(self.target):
            self._stub.Abort(request, timeout=deadline(timeout))

    def info(self, *, timeout: float = 10.0) -> ServerInfo:
        """What is being served, and the load now."""
        self._require_open()
        with _mapped_errors(self.target):
            return server_info(self._stub.GetInfo(gateway_pb2.GetInfoRequest(), timeout=deadline(timeout)))

    def health(self, *, timeout: float = transport.HEALTH_TIMEOUT_S) -> bool:
        """Whether the gateway can serve; False also when nobody answers within `timeout` seconds."""
        self._require_open()
        try:
            with _mapped_errors(self.target):
                answer: bytes = self._check_health(transport.HEALTH_REQUEST, timeout=deadline(timeout))
        except (UnavailableError, DeadlineExceededError):
            return False
        return answer == transport.HEALTH_SERVING

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Waits until the gateway can serve. Raises DeadlineExceededError after `timeout` seconds."""
        wait = transport.ReadyWait(self.target, deadline(timeout))
        while not self.health(timeout=wait.next_timeout_s()):
            time.sleep(transport.POLL_S)

    def _require_open(self) -> None:
        if self._closed:
            raise BranchlineError("the client is closed", "CANCELLED")


class Stream(Generic[ChunkT, ResultT]):
    """A running generation: an iterator of chunks which knows the whole result after its end.

    It is cancelled, and everything it holds on the workers is freed, by `close()`, by leaving its `with` block, or
    when the last reference to it goes (so `for chunk in client.generate(…): break` is enough).
    """

    def __init__(self, call: Any, collector: Collects[ChunkT, ResultT], target: str) -> None:
        """`call`: gRPC's, which has been made."""
        self._target = target
        self._collector = collector
        self._call = call

    def __iter__(self) -> Iterator[ChunkT]:
        return self

    def __next__(self) -> ChunkT:
        while True:
            with _mapped_errors(self._target):
                response = next(self._call, None)
            if response is None:
                self._collector.finish()
                raise StopIteration
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

    def request_id(self) -> str:
        """What `abort` and `status` call it. Waits until the gateway has read the request."""
        with _mapped_errors(self._target):
            return transport.request_id(self._call.initial_metadata())

    def close(self) -> None:
        """Cancels the generation unless it has ended. Idempotent."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # absent when the call could not be made
            self.close()


@contextlib.contextmanager
def _mapped_errors(target: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target) from error
