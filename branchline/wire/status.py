"""Errors and gRPC status codes: what a handler raises, what a peer reads.

A handler says what went wrong by raising: `InvalidRequestError` for a request that can never succeed,
`RpcFailure` for anything else that the peer should know. `failure_for` turns both into a code and a
message; whatever is not listed there is a defect of ours and must not reach the peer in detail.
"""

from __future__ import annotations

import grpc

from branchline.core import InvalidRequestError

#: gRPC's own name for a server's hint, in the trailing metadata: milliseconds until the client may try again.
RETRY_METADATA = "grpc-retry-pushback-ms"

#: gRPC puts the message into a header, and peers accept 8 KiB of headers in all.
MAX_DETAILS_CHARS = 1000


class RpcFailure(Exception):  # noqa: N818 - it is the outcome of a call, named as gRPC does
    """Ends an RPC with `code`; `details` is meant for the peer. `retry_after_s`: when it may try again, if that could
    help; None says nothing.
    """

    def __init__(self, code: grpc.StatusCode, details: str, *, retry_after_s: float | None = None) -> None:
        if code is grpc.StatusCode.OK:
            raise ValueError("OK is not a failure")
        super().__init__(code, details)
        self.code = code
        self.details = details
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.code.name}: {self.details}"


#: What a handler may raise to tell its peer something. NotImplementedError is what generated servicers raise.
FORESEEN = (RpcFailure, InvalidRequestError, NotImplementedError)


def failure_for(error: RpcFailure | InvalidRequestError | NotImplementedError) -> RpcFailure:
    """What the peer is told about `error`."""
    match error:
        case RpcFailure():
            return RpcFailure(error.code, shorten(error.details), retry_after_s=error.retry_after_s)
        case InvalidRequestError():
            return RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, shorten(str(error)))
        case NotImplementedError():
            return RpcFailure(grpc.StatusCode.UNIMPLEMENTED, "this server does not offer the method")


def describe(error: grpc.RpcError) -> str:
    """A failed call in one readable line, `CODE: details`, for logs and for messages to the next peer."""
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return str(error) or type(error).__name__
    return f"{error.code().name}: {error.details() or '(no details)'}"


def shorten(details: str) -> str:
    if len(details) <= MAX_DETAILS_CHARS:
        return details
    return details[: MAX_DETAILS_CHARS - 1] + "…"
