"""The HTTP server's life: bind, serve beside the gRPC server on its event loop, stop within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

from branchline.wire.server import BindError, PortInUseError

#: Seconds that answers which have been told to end may take for it.
_GRACE_S = 3.0
_START_S = 10.0
#: Seconds that a client may take for a TLS handshake; asyncio would give it a minute.
TLS_HANDSHAKE_S = 10.0


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's: it tells this server to stop."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's own for open sockets, but with a deadline for handshakes."""
        assert sockets is not None
        config, state = self.config, self.server_state

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]
            return made

        create = asyncio.get_running_loop().create_server
        limit = TLS_HANDSHAKE_S if config.ssl else None
        self.servers = [
            await create(protocol, sock=sock, ssl=config.ssl, backlog=config.backlog, ssl_handshake_timeout=limit)
            for sock in sockets
        ]
        self.started = True


class HttpServer:
    """Use it from one event loop; `start` once."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        protocol: type[asyncio.Protocol] | Literal["h11"] = "h11",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`protocol`: uvicorn's own, or a class derived from it. Without `tls` it is plain text."""
        self._app = app
        self._host = host
        self._port = port
        self._protocol = protocol
        self._tls = tls
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Binds, serves, and returns HOST:PORT with the real port. Raises PortInUseError or BindError."""
        assert self._serving is None, "a server can be started once"
        listener, tls = _bind(self._host, self._port), self._tls
        self._server = _Server(
            uvicorn.Config(
                self._app,
                http=self._protocol,
                ws="none",
                lifespan="off",
                log_config=None,  # logging is the process's
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(_GRACE_S),
                ssl_context_factory=(lambda _config, _default: tls) if tls else None,
            )
        )
        self._serving = asyncio.create_task(self._server.serve([listener]), name="http server")
        async with asyncio.timeout(_START_S):
            while not self._server.started and not self._serving.done():
                await asyncio.sleep(0.01)
        if self._serving.done():
            self._serving.result()
        port = listener.getsockname()[1]
        return f"[{self._host}]:{port}" if ":" in self._host else f"{self._host}:{port}"

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self._server.server_state.connections) if self._server else 0

    async def stop(self) -> None:
        """Takes no more connections, gives answers that are being written a moment, cancels them. Idempotent."""
        if self._server is None or self._serving is None:
            return
        self._server.should_exit = True
        await self._serving


def _bind(host: str, port: int) -> socket.socket:
    """A socket that listens on the first address that `host` stands for."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise BindError(f"cannot listen on {where}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"port {port} on {host} is in use by another process") from error
        raise BindError(f"cannot listen on {where}: {error.strerror}") from error
    return listener
