"""What an HTTP connection may do: there are so many of them, and none waits for its client's headers for long."""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.http.errors import HttpError, phrase

#: Seconds in which the headers of a request must have come, from the connection's beginning or the last answer's end.
#: (A body has its own time: `exchange.BODY_TIMEOUT_S`.)
HEADERS_TIMEOUT_S = 15.0
#: Seconds that a connection which is one too many may take to send something.
_REQUEST_S = 1.0


def bounded_protocol(max_connections: int) -> type[H11Protocol]:
    """Uvicorn's HTTP/1.1 with these bounds. Uvicorn makes one for each connection, and takes a class."""

    class Bounded(_Bounded):
        most = max_connections

    return Bounded


class _Bounded(H11Protocol):
    most: int
    _timer: asyncio.TimerHandle | None = None
    _one_too_many = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            # Told when the request comes: a connection that is closed with something unread is reset, and the client
            # would not see why.
            self._one_too_many = True
            self._timer = self.loop.call_later(_REQUEST_S, self._turn_away)
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        if self._one_too_many:
            self._turn_away()
        elif not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's answer to what is no HTTP, in the shape of all others."""
        if self._answering:  # it came behind a request
            self.transport.close()
        else:
            self._refuse(HttpError(400, msg))

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """The time for headers runs while no request is being answered."""
        if self._answering:
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEADERS_TIMEOUT_S, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _turn_away(self) -> None:
        self._stop_timer()
        message = f"The gateway has {self.most} HTTP connections already, and not more at once."
        self._refuse(HttpError(503, message, headers={"retry-after": "1"}))

    def _too_late(self) -> None:
        self._timer = None
        if self.conn.trailing_data[0]:
            self._refuse(HttpError(408, "The request's headers did not come in time."))
        else:  # nothing has come
            self.transport.close()

    def _refuse(self, error: HttpError) -> None:
        """By hand: there is no request that h11 could answer."""
        if self.transport.is_closing():
            return
        body = json.dumps(error.body).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error.headers,
        }
        lines = [f"HTTP/1.1 {error.status} {phrase(error.status)}", *(f"{name}: {v}" for name, v in headers.items())]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
