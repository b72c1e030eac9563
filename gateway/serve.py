"""A gateway from start to stop, in any event loop: a process of its own or a Ray actor."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import branchline.v1.gateway_pb2_grpc as gateway_pb2_grpc
from branchline.config import Config, GatewayConfig
from branchline.engine.models.locate import locate_model
from branchline.observe.exposition import exposed
from branchline.observe.tracing import Tracer, tracing
from branchline.wire.server import RpcServer
from gateway.backend import Backend
from gateway.desk import Desk
from gateway.parsing import Parsers
from gateway.pool import WorkerPool, WorkersNotReadyError
from gateway.service import GatewayService
from gateway.tokens import Tokens

if TYPE_CHECKING:
    from branchline.wire.http_server import HttpServer

SERVICE = "branchline.v1.GatewayService"

#: Seconds between two lines of progress while workers are awaited.
_REPORT_INTERVAL_S = 5.0


def _silent(_line: str) -> None:
    pass


def _nobody(_pool: WorkerPool) -> None:
    pass


async def serve(
    config: Config,
    *,
    ready: Callable[..., None],
    stop: asyncio.Event,
    progress: Callable[[str], None] = _silent,
    on_pool: Callable[[WorkerPool], None] = _nobody,
) -> None:
    """Serves until `stop` is set; calls `ready("HOST:PORT")` when the first request can be answered, with the address
    of the HTTP API as a second argument if it is served.

    `on_pool` gets the pool of workers as soon as it exists: its `update` may then be called from any thread when
    addresses change. Raises ModelError, BindError, WorkersNotReadyError, or InvalidRequestError for an address of a
    worker that is not HOST:PORT. Everything is closed when it returns or raises.
    """
    async with tracing(config.tracing, "gateway", secrets.token_hex(8)) as tracer:
        await _serve(config, tracer, ready, stop, progress, on_pool)


async def _serve(
    config: Config,
    tracer: Tracer,
    ready: Callable[..., None],
    stop: asyncio.Event,
    progress: Callable[[str], None],
    on_pool: Callable[[WorkerPool], None],
) -> None:
    settings = config.gateway
    tokens = await asyncio.to_thread(_load_tokens, config.model.model, progress)
    parsers = await asyncio.to_thread(_load_parsers, settings, tokens, progress)
    backend = Backend(settings)
    desk = Desk.make(backend, tokens, config.model.model, parsers, tracer)
    server = RpcServer(settings.host, settings.grpc_port)
    server.add(SERVICE, GatewayService(desk), gateway_pb2_grpc.add_GatewayServiceServicer_to_server)
    http = await asyncio.to_thread(_load_http, settings, desk, progress) if settings.http_port >= 0 else None
    try:
        backend.pool.update(config.gateway.prefill_workers, config.gateway.decode_workers)
        on_pool(backend.pool)
        async with exposed(desk.registry, settings.host, settings.metrics_port, progress):
            if await _workers_ready(backend.pool, stop, config.ray.start_timeout_s, progress):
                addresses = [await server.start()] + ([await http.start()] if http else [])
                ready(*addresses)
                await stop.wait()
    finally:
        desk.door.close()
        if http:
            await http.stop()
        await server.stop(grace_s=0)
        await backend.close()
        tokens.close()


def _load_tokens(model: str, progress: Callable[[str], None]) -> Tokens:
    directory: Path = locate_model(model, progress)
    progress("gateway: loading the tokenizer")
    return Tokens.load(directory)


def _load_http(settings: GatewayConfig, desk: Desk, progress: Callable[[str], None]) -> HttpServer:
    """Imported only where it is served: OpenAI's types take a second or two."""
    progress("gateway: loading the HTTP API")
    from branchline.wire.http_server import HttpServer
    from gateway.http.app import application

    return HttpServer(application(desk), settings.host, settings.http_port)


def _load_parsers(settings: GatewayConfig, tokens: Tokens, progress: Callable[[str], None]) -> Parsers | None:
    if not (settings.tool_parser or settings.reasoning_parser):
        return None
    progress("gateway: loading vLLM's parsers")
    from gateway.vllm_parsers import VllmParsers

    return VllmParsers(tokens.tokenizer, settings.tool_parser, settings.reasoning_parser)


async def _workers_ready(
    pool: WorkerPool, stop: asyncio.Event, timeout_s: float, progress: Callable[[str], None]
) -> bool:
    """Waits for one pair that can share KV; False when `stop` was set first."""
    await asyncio.sleep(0)  # the pool takes its addresses in the loop's next turn
    until = time.monotonic() + timeout_s
    report_at = time.monotonic()
    while not (pairs := pool.pairs()).fitting:
        if stop.is_set():
            return False
        lacking = pairs.misfit or f"waiting for {_missing(pool)}"
        now = time.monotonic()
        if now >= until:
            raise WorkersNotReadyError(f"not ready after {timeout_s:g} s: {lacking}")
        if now >= report_at:
            progress(f"gateway: {lacking}")
            report_at = now + _REPORT_INTERVAL_S
        await pool.wait_for_change(0.2)
    return not stop.is_set()


def _missing(pool: WorkerPool) -> str:
    silent = [str(worker) for worker in pool.workers if not worker.healthy]
    return ", ".join(silent) if silent else "a prefill and a decode worker's address"
