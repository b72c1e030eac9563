"""What can go wrong, as exceptions: one class per thing that a caller may want to treat differently.

BranchlineError
├── InvalidRequestError   the request can never succeed: change it
├── AuthenticationError   the API key is missing, wrong or revoked
├── OverloadedError       no room until the deadline, or the API key's limits are used up: try again later
├── UnavailableError      no gateway, or no worker behind it: try again
├── DeadlineExceededError the timeout passed
├── CancelledError        the call was cancelled, by this side or by a server that stops
├── UnsupportedError      the server is too old for this call, or it is another service
└── ServerError           a defect of the server's; `details` holds an id that is in its log
"""

from __future__ import annotations

import grpc

#: Of trailing metadata: milliseconds until the client may try again.
RETRY_METADATA = "grpc-retry-pushback-ms"


class BranchlineError(Exception):
    """A call that failed. `code` is gRPC's name for it (`"UNAVAILABLE"`), `details` the server's explanation,
    `retry_after` the seconds after which the server would have it tried again, None if it has said nothing.
    """

    retry_after: float | None = None

    def __init__(self, details: str, code: str = "UNKNOWN") -> None:
        super().__init__(details)
        self.code = code
        self.details = details

    def __str__(self) -> str:
        return f"{self.details} ({self.code})"


class InvalidRequestError(BranchlineError, ValueError):
    """The request is wrong; the message names the field. Sending it again cannot help."""

    def __init__(self, details: str, code: str = "INVALID_ARGUMENT") -> None:
        super().__init__(details, code)


class AuthenticationError(BranchlineError):
    """The gateway wants an API key, and this is none that it knows."""


class OverloadedError(BranchlineError):
    """The system is full, or the API key has reached one of its limits: the message says which."""


class UnavailableError(BranchlineError):
    """Nobody answers at the address, or the gateway has no worker that could serve."""


class DeadlineExceededError(BranchlineError, TimeoutError):
    """The call's timeout passed."""


class CancelledError(BranchlineError):
    """The call was cancelled. (In asyncio, cancelling the task raises asyncio.CancelledError, as everywhere.)"""


class UnsupportedError(BranchlineError):
    """The server does not know the method."""


class ServerError(BranchlineError):
    """The server failed in a way that it should not."""


_BY_CODE: dict[grpc.StatusCode, type[BranchlineError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: InvalidRequestError,
    grpc.StatusCode.ALREADY_EXISTS: InvalidRequestError,
    grpc.StatusCode.PERMISSION_DENIED: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.ABORTED: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
}


def from_rpc_error(error: grpc.RpcError, target: str) -> BranchlineError:
    """The exception for a failed gRPC call to `target`; raise it `from error`."""
    code: grpc.StatusCode = error.code()
    details: str = error.details() or code.name.lower().replace("_", " ")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return InvalidRequestError(details, code.name)  # gRPC's own limit on a message, which no waiting lifts
    if code is grpc.StatusCode.UNAVAILABLE:
        details = f"{target}: {details}"
    failure = _BY_CODE[code](details, code.name)
    failure.retry_after = _retry_after(error)
    return failure


def _retry_after(error: grpc.RpcError) -> float | None:
    """The server's hint, in seconds."""
    for name, value in error.trailing_metadata() or ():
        if name == RETRY_METADATA and isinstance(value, str) and value.isascii() and value.isdigit():
            return int(value) / 1000
    return None
