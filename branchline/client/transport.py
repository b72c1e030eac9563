"""What the two clients share below their calls: channel options, the health check, the wait for readiness."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from branchline.client.chat import chat_request
from branchline.client.errors import DeadlineExceededError, InvalidRequestError
from branchline.client.values import text_value
from branchline.v1 import gateway_pb2

#: grpc.health.v1's messages by hand, which saves a dependency: an empty request asks for the server as a whole,
#: and field 1 of the response is 1 for SERVING.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_REQUEST = b""
HEALTH_SERVING = b"\x08\x01"

#: Seconds between two looks while waiting for readiness, and that one of them may take.
POLL_S = 0.1
HEALTH_TIMEOUT_S = 5.0
#: Seconds that a call has which generates nothing.
CALL_TIMEOUT_S = 10.0

#: What a call carries beside its message.
Metadata = tuple[tuple[str, str], ...]

_LOOPBACK = ("127.", "localhost:", "[::1]:")
_MAX_MESSAGE_BYTES = 8 * 1024 * 1024


class Gateways:
    """The gateways that a client was given, and the one of them that it talks to. Safe to share between threads."""

    def __init__(self, target: str) -> None:
        """`target`: HOST:PORT, or several with commas between. Raises InvalidRequestError."""
        self.targets = tuple(dict.fromkeys(part.strip() for part in target.split(",")))
        for part in self.targets:
            host, separator, port = part.rpartition(":")
            if not separator or not host or not port.isascii() or not port.isdigit():
                raise InvalidRequestError(f"target: must be HOST:PORT, got {part!r}")
        self.current = self.targets[0]

    def leave(self, target: str) -> None:
        """`target` has failed: the next one's turn, unless somebody else has left it before."""
        if self.current == target:
            self.current = self.targets[(self.targets.index(target) + 1) % len(self.targets)]


def channel_options(target: str) -> list[tuple[str, int | str]]:
    """A gateway that stalls is found by pings while a call runs; an idle client stays silent."""
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if target.startswith(_LOOPBACK):  # this machine is never behind the proxy that the environment may name
        options.append(("grpc.enable_http_proxy", 0))
    return options


#: Where a generating call's initial metadata names its request.
REQUEST_ID_METADATA = "x-request-id"


def request_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Of a call's initial metadata; empty when the server gives none."""
    return next((str(value) for name, value in metadata or () if name == REQUEST_ID_METADATA), "")


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def trace_metadata(traceparent: str | None) -> Metadata:
    """Of a call. Raises InvalidRequestError for what is no W3C trace context."""
    if traceparent is None:
        return ()
    if not isinstance(traceparent, str) or _TRACEPARENT.fullmatch(traceparent) is None:
        raise InvalidRequestError(f"traceparent: must be 00-TRACE-SPAN-FLAGS in lower hexadecimal, got {traceparent!r}")
    return (("traceparent", traceparent),)


def tokenize_request(
    prompt: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    tools: Sequence[Mapping[str, Any]],
    model: str | None,
) -> gateway_pb2.TokenizeRequest:
    """Raises InvalidRequestError."""
    if (prompt is None) == (messages is None):
        raise InvalidRequestError("exactly one of prompt and messages is needed")
    if messages is not None:
        return gateway_pb2.TokenizeRequest(chat=chat_request(messages=messages, tools=tools), model=model_value(model))
    return gateway_pb2.TokenizeRequest(prompt=text_value("prompt", prompt), model=model_value(model))


def model_value(model: str | None) -> str | None:
    """Raises InvalidRequestError."""
    return None if model is None else text_value("model", model)


class ReadyWait:
    """The clock of `wait_ready`."""

    def __init__(self, target: str, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def next_timeout_s(self) -> float:
        """How long the next look may take. Raises DeadlineExceededError when the time is up."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError(
                f"{self._target} was not ready within {self._timeout_s:g} s", "DEADLINE_EXCEEDED"
            )
        return min(left, HEALTH_TIMEOUT_S)
