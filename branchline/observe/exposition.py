"""`/metrics`: the page, and a port of its own for it in any process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest

from branchline.wire.tls import ServerFiles, server_context

PATH = "/metrics"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def page(registry: CollectorRegistry) -> bytes:
    """In Prometheus's text format. Reads the process's state: to be called on its event loop."""
    return generate_latest(registry)


@contextlib.asynccontextmanager
async def exposed(
    registry: CollectorRegistry,
    host: str,
    port: int,
    progress: Callable[[str], None],
    files: ServerFiles | None = None,
) -> AsyncGenerator[None]:
    """Serves the page at `host:port` for the duration of the block; 0 takes a free port, and below 0 there is none.
    `progress` is told where. With `files` over TLS, as the process's other port. Raises BindError or ConfigError.
    """
    if port < 0:
        yield
        return
    # Only where it is served: it takes a moment.
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from branchline.wire.http_server import HttpServer

    async def metrics(_request: Request) -> Response:
        return Response(page(registry), media_type=CONTENT_TYPE)

    tls = server_context(files) if files else None
    server = HttpServer(Starlette(routes=[Route(PATH, metrics)]), host, port, tls=tls)
    progress(f"metrics at {'https' if tls else 'http'}://{await server.start()}{PATH}")
    try:
        yield
    finally:
        await server.stop()
