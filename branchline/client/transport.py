"""What the two clients share below their calls: channel options, the health check, the wait for readiness."""

from __future__ import annotations

import time

from branchline.client.errors import DeadlineExceededError, InvalidRequestError

#: grpc.health.v1's messages by hand, which saves a dependency: an empty request asks for the server as a whole,
#: and field 1 of the response is 1 for SERVING.
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_REQUEST = b""
HEALTH_SERVING = b"\x08\x01"

#: Seconds between two looks while waiting for readiness, and that one of them may take.
POLL_S = 0.1
HEALTH_TIMEOUT_S = 5.0

_LOOPBACK = ("127.", "localhost:", "[::1]:")
_MAX_MESSAGE_BYTES = 8 * 1024 * 1024


def check_target(target: str) -> str:
    host, separator, port = target.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit():
        raise InvalidRequestError(f"target: must be HOST:PORT, got {target!r}")
    return target


def channel_options(target: str) -> list[tuple[str, int]]:
    """A gateway that stalls is found by pings while a call runs; an idle client stays silent."""
    options = [
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
