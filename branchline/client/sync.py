"""The synchronous client. Safe to share between threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from branchline.client import transport
from branchline.client.collect import Collector
from branchline.client.errors import BranchlineError, DeadlineExceededError, UnavailableError, from_rpc_error
from branchline.client.options import DEFAULT_TIMEOUT_S, GenerateOptions, deadline, generate_request
from branchline.client.results import Chunk, Completion, ServerInfo, server_info
from branchline.v1 import gateway_pb2, gateway_pb2_grpc


class Client:
    """A connection to a gateway:

        with Client("127.0.0.1:50051") as client:
            print(client.complete(prompt="The capital of France is", max_tokens=16).text)

    It connects with its first call. `timeout` is the deadline in seconds of calls that bring none.
    Calls raise the exceptions of `branchline.client.errors`.
    """

    def __init__(self, target: str, *, timeout: float = DEFAULT_TIMEOUT_S) -> None:
        self.target = transport.check_target(target)
        self._timeout_s = deadline(timeout)
        self._channel = grpc.insecure_channel(target, options=transport.channel_options(target))
        self._stub = gateway_pb2_grpc.GatewayServiceStub(self._channel)
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

    def complete(self, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """Generates and waits for the end, at most `timeout` seconds. Options: see GenerateOptions."""
        with self.generate(timeout=timeout, **options) as stream:
            for _ in stream:
                pass
            return stream.result

    def generate(self, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Generates and yields the parts as they come, for `timeout` seconds. Options: see GenerateOptions."""
        timeout_s = self._timeout_s if timeout is None else deadline(timeout)
        request = generate_request(**options)
        self._require_open()
        return Stream(self._stub, request, timeout_s, self.target)

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


class Stream:
    """A running generation: an iterator of chunks which knows the whole result after its end.

    It is cancelled, and everything it holds on the workers is freed, by `close()`, by leaving its `with` block, or
    when the last reference to it goes (so `for chunk in client.generate(…): break` is enough).
    """

    def __init__(self, stub: Any, request: gateway_pb2.GenerateRequest, timeout_s: float, target: str) -> None:
        self._target = target
        self._collector = Collector(max(1, request.n))
        self._call = stub.Generate(request, timeout=timeout_s)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
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
    def result(self) -> Completion:
        """All of it together. Raises RuntimeError before the stream has ended."""
        if self._collector.result is None:
            raise RuntimeError("the stream has not come to its end")
        return self._collector.result

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
