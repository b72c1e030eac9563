"""Errors as OpenAI's API reports them: a status code, and a JSON body whose `error` has four fields."""

from __future__ import annotations

import http
import math
import types
from collections.abc import Mapping
from typing import Any

import grpc
from pydantic import ValidationError

from branchline.core import InvalidRequestError
from branchline.wire.status import RpcFailure, shorten

#: The status of a request that was aborted or whose client has gone; no standard knows one, nginx's is widely known.
CLIENT_CLOSED = 499

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: CLIENT_CLOSED,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
#: The other way, for errors that are HTTP's own.
_CODE = {
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    CLIENT_CLOSED: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout"}
#: Seconds to wait when the refusal itself gives none.
_RETRY_AFTER_S = {429: 1.0, 503: 1.0}


class HttpError(Exception):
    """What the client gets. `param` is the field that is wrong, if one is."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        headers: Mapping[str, str] = types.MappingProxyType({}),
        grpc_code: grpc.StatusCode | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers
        #: What it is counted as.
        self.grpc_code = grpc_code or _CODE.get(status, grpc.StatusCode.INVALID_ARGUMENT)

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        code = self.code or _CODES.get(self.status)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> HttpError:
    return HttpError(400, message, param, code)


def from_failure(error: RpcFailure | InvalidRequestError) -> HttpError:
    """What the client is told about a request that the gateway or its workers refuse."""
    if isinstance(error, InvalidRequestError):
        message = str(error)
        code = "context_length_exceeded" if "context limit" in message else None
        return invalid(shorten(message), _field(message), code)
    status = _STATUS.get(error.code, 500)
    retry_s = error.retry_after_s if error.retry_after_s is not None else _RETRY_AFTER_S.get(status)
    headers = {} if retry_s is None else {"retry-after": str(math.ceil(retry_s))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return HttpError(status, shorten(error.details), headers=headers, grpc_code=error.code)


def from_validation(error: ValidationError) -> HttpError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = _path(first["loc"])
    match first["type"]:
        case "json_invalid":
            return invalid(f"The body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        case "extra_forbidden":
            return invalid(f"Unrecognized request argument supplied: {path}", path, "unknown_parameter")
        case "missing":
            return invalid(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
        case "value_error":
            message = first["msg"].removeprefix("Value error, ")
            return invalid(f"Invalid '{path}': {message}" if path else message, path or None, "invalid_value")
    return invalid(f"Invalid '{path}': {first['msg']}." if path else first["msg"], path or None, "invalid_type")


def phrase(status: int) -> str:
    """The usual words for a status code."""
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _field(message: str) -> str | None:
    """Messages about a field begin with its name."""
    name = message.partition(" ")[0].rstrip(":")
    return name.partition("[")[0] if name.replace("_", "").replace(".", "").partition("[")[0].isalpha() else None


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[1].content`; the names of a union's members, which pydantic adds, are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool", "list", "dict"):
            path += f".{part}" if path else part
    return path
