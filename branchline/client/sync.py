"""The synchronous client. Safe to share between threads."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from branchline.client import transport
from branchline.client.chat import ChatChunk, ChatCollector, ChatCompletion, ChatOptions, chat_request
from branchline.client.collect import Collector
from branchline.client.connections import Connections
from branchline.client.errors import DeadlineExceededError, UnavailableError
from branchline.client.options import DEFAULT_TIMEOUT_S, GenerateOptions, deadline, generate_request
from branchline.client.recovery import DEFAULT_RETRIES, Recovery, check_retries
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
from branchline.client.streams import Stream, mapped_errors
from branchline.client.tls import Tls
from branchline.client.values import ids_value, text_value
from branchline.v1 import gateway_pb2


class Client:
    """A connection to a gateway:

        with Client("127.0.0.1:50051") as client:
            print(client.complete(prompt="The capital of France is", max_tokens=16).text)

    It connects with its first call. Of several gateways, with commas between, it talks to one, and to the next one when
    that fails. `timeout` is the deadline in seconds of calls that bring none. A generation whose gateway fails goes on
    at the next token, in the same stream, after at most `retries` attempts in a row; 0 passes on every failure.
    The `traceparent` of a call is a W3C trace context: the gateway's spans then belong to the caller's trace.
    `api_key` is what a gateway with keys asks for; without `tls` it goes over the network for everybody to read.
    Calls raise the exceptions of `branchline.client.errors`.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        retries: int = DEFAULT_RETRIES,
        api_key: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.target = target
        self._timeout_s, self._retries = deadline(timeout), check_retries(retries)
        self._connections = Connections(target, grpc, mapped_errors, api_key=api_key, tls=tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs and disconnects. Idempotent."""
        for channel in self._connections.close():
            channel.close()

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
        collector = Collector(max(1, request.n))
        recovery = Recovery(request, collector.received, retries=self._retries, timeout_s=timeout_s)
        start = functools.partial(self._connections.start, "Generate", recovery, metadata)
        return Stream(start, recovery, collector)

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
        recovery = Recovery(request, collector.received, retries=self._retries, timeout_s=timeout_s)
        start = functools.partial(self._connections.start, "Chat", recovery, metadata)
        return Stream(start, recovery, collector)

    def tokenize(
        self,
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        model: str | None = None,
        timeout: float = transport.CALL_TIMEOUT_S,
    ) -> tuple[int, ...]:
        """The token ids of a prompt, or of a chat with the model's template applied."""
        request = transport.tokenize_request(prompt, messages, tools, model)
        with self._connections.asking() as gateway:
            return tuple((gateway.stub.Tokenize(request, timeout=deadline(timeout))).token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        special_tokens: bool = False,
        model: str | None = None,
        timeout: float = transport.CALL_TIMEOUT_S,
    ) -> str:
        """The text of token ids; with `special_tokens` shown by their names."""
        ids = ids_value("token_ids", token_ids)
        name = transport.model_value(model)
        request = gateway_pb2.DetokenizeRequest(token_ids=ids, special_tokens=special_tokens, model=name)
        with self._connections.asking() as gateway:
            text: str = (gateway.stub.Detokenize(request, timeout=deadline(timeout))).text
            return text

    def models(self, *, timeout: float = transport.CALL_TIMEOUT_S) -> tuple[Model, ...]:
        """The models that are served."""
        with self._connections.asking() as gateway:
            return models(gateway.stub.ListModels(gateway_pb2.ListModelsRequest(), timeout=deadline(timeout)))

    def status(self, *, timeout: float = transport.CALL_TIMEOUT_S) -> GatewayStatus:
        """The requests that the gateway is serving now, by whichever interface they came."""
        with self._connections.asking() as gateway:
            return gateway_status(gateway.stub.GetStatus(gateway_pb2.GetStatusRequest(), timeout=deadline(timeout)))

    def abort(self, request_id: str, *, reason: str = "", timeout: float = transport.CALL_TIMEOUT_S) -> None:
        """Ends a request that the gateway is serving; its client gets CancelledError. Raises InvalidRequestError when
        there is no such request, or no more.
        """
        request = gateway_pb2.GatewayServiceAbortRequest(
            request_id=text_value("request_id", request_id), reason=text_value("reason", reason)
        )
        with self._connections.asking() as gateway:
            gateway.stub.Abort(request, timeout=deadline(timeout))

    def info(self, *, timeout: float = 10.0) -> ServerInfo:
        """What is being served, and the load now."""
        with self._connections.asking() as gateway:
            return server_info(gateway.stub.GetInfo(gateway_pb2.GetInfoRequest(), timeout=deadline(timeout)))

    def health(self, *, timeout: float = transport.HEALTH_TIMEOUT_S) -> bool:
        """Whether the gateway can serve; False also when nobody answers within `timeout` seconds."""
        try:
            with self._connections.asking() as gateway:
                answer: bytes = gateway.check_health(transport.HEALTH_REQUEST, timeout=deadline(timeout))
        except (UnavailableError, DeadlineExceededError):
            return False
        return answer == transport.HEALTH_SERVING

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Waits until the gateway can serve. Raises DeadlineExceededError after `timeout` seconds."""
        wait = transport.ReadyWait(self.target, deadline(timeout))
        while not self.health(timeout=wait.next_timeout_s()):
            time.sleep(transport.POLL_S)
