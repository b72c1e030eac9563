"""How many HTTP requests are read or answered at once."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.http.errors import HttpError

#: Load balancers ask there whether the gateway is well, which a full one is.
_ALWAYS = "/health"


class Crowd:
    """Around an application: refuses what would be one too many before anything of it is read.

    Belongs to one event loop.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == _ALWAYS:
            await self._app(scope, receive, send)
            return
        if self._requests >= self._most:
            message = f"The gateway has {self._requests} HTTP requests already, and {self._most} at most."
            # Its body is not read, so that the connection is of no more use.
            error = HttpError(429, message, headers={"retry-after": "1", "connection": "close"})
            await JSONResponse(error.body, error.status, dict(error.headers))(scope, receive, send)
            return
        self._requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests -= 1
