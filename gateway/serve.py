"""A gateway from start to stop, in any event loop: a process of its own or a Ray actor."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from branchline.config import Config, GatewayConfig
from branchline.engine.models.locate import locate_model
from branchline.observe.exposition import exposed
from branchline.observe.tracing import Tracer, tracing
from branchline.wire.server import RpcServer, is_loopback
from branchline.wire.tls import ChannelTls, ServerFiles, channel_tls, outside_files, server_context, server_credentials
from branchline.workload import Workload, nobody
from gateway.backend import Backend
from gateway.background import Background
from gateway.desk import Desk
from gateway.keys import Keyring
from gateway.model import Model
from gateway.parsing import Parsers
from gateway.pool import WorkerPool, WorkersNotReadyError
from gateway.service import GatewayService
from gateway.tokens import Tokens

if TYPE_CHECKING:
    from branchline.wire.http_server import HttpServer

logger = logging.getLogger(__name__)

#: Seconds between two lines of progress while workers are awaited.
_REPORT_INTERVAL_S = 5.0


def _silent(_line: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Hooks:
    """What whoever runs the gateway is handed as soon as it exists."""

    #: The pools of workers by model as `Config.each` names them; their `update` may be called from any thread when
    #: addresses change.
    on_pools: Callable[[Mapping[str, WorkerPool]], None] = nobody
    #: What tells the gateway's load, and what makes it drain: it lets nobody in to generate any more, and serves those
    #: inside. Both to be called on this event loop.
    on_load: Callable[[Callable[[], Workload]], None] = nobody
    on_drain: Callable[[Callable[[], None]], None] = nobody


async def serve(
    config: Config,
    *,
    ready: Callable[..., None],
    stop: asyncio.Event,
    progress: Callable[[str], None] = _silent,
    on_pools: Callable[[Mapping[str, WorkerPool]], None] = nobody,
    on_load: Callable[[Callable[[], Workload]], None] = nobody,
    on_drain: Callable[[Callable[[], None]], None] = nobody,
) -> None:
    """Serves until `stop` is set; calls `ready("HOST:PORT")` when the first request can be answered, with the address
    of the HTTP API as a second argument if it is served.

    The hooks are those of `Hooks`. Raises ConfigError, ModelError, BindError, WorkersNotReadyError, or
    InvalidRequestError for an address of a worker that is not HOST:PORT. Everything is closed when it returns or
    raises.
    """
    async with tracing(config.tracing, "gateway", secrets.token_hex(8)) as tracer:
        await _serve(config, tracer, ready, stop, progress, Hooks(on_pools, on_load, on_drain))


async def _serve(
    config: Config,
    tracer: Tracer,
    ready: Callable[..., None],
    stop: asyncio.Event,
    progress: Callable[[str], None],
    hooks: Hooks,
) -> None:
    settings = config.gateway
    # First, so that a mistake is told at once.
    inside, files = channel_tls(config.security.inside), outside_files(config.security.outside)
    credentials = server_credentials(files)
    keyring = Keyring(config.security.api_keys) if config.security.api_keys else None
    _warn_of_openness(config)
    desk = Desk.make(settings, keyring, tracer)
    server = RpcServer(settings.host, settings.grpc_port, credentials, settings.max_grpc_calls)
    GatewayService(desk).add_to(server)
    background, http = Background(), None
    try:
        pools = {}
        for name, own in config.each().items():
            pools[name] = (await _add_model(desk, own, inside, progress)).backend.pool
        if settings.http_port >= 0:
            http = await asyncio.to_thread(_load_http, settings, desk, files, progress)
        if keyring:
            background.spawn(keyring.watch(desk.door.keys_changed), "watch keys")
        hooks.on_pools(pools)
        hooks.on_load(lambda: _workload(desk))
        hooks.on_drain(desk.door.drain)
        async with exposed(desk.registry, settings.host, settings.metrics_port, progress, files):
            if await _workers_ready(desk.models, stop, config.ray.start_timeout_s, progress):
                addresses = [await server.start()] + ([await http.start()] if http else [])
                ready(*addresses)
                await stop.wait()
    finally:
        desk.door.close()
        await background.close()
        if http:
            await http.stop()
        await server.stop(grace_s=0)
        for model in desk.models:
            await model.close()


async def _add_model(desk: Desk, config: Config, inside: ChannelTls | None, progress: Callable[[str], None]) -> Model:
    settings = config.gateway
    tokens = await asyncio.to_thread(_load_tokens, config.model.model, progress)
    parsers = await asyncio.to_thread(_load_parsers, settings, tokens, progress)
    model = desk.add(
        config.model.model, Backend(settings, inside, block_size=config.engine.block_size), tokens, parsers
    )
    model.backend.pool.update(settings.prefill_workers, settings.decode_workers)
    return model


def _workload(desk: Desk) -> Workload:
    active, waiting = desk.door.active_requests, sum(model.backend.placer.waiting for model in desk.models)
    return Workload(running=max(0, active - waiting), queued=waiting, unfinished=active)


def _warn_of_openness(config: Config) -> None:
    """Says in the log what anybody on the network could do."""
    if not config.security.api_keys and not is_loopback(config.gateway.host):
        logger.warning(
            "the gateway listens on %s and needs no API key: whoever reaches it may use it (security.api_keys)",
            config.gateway.host,
        )


def _load_tokens(model: str, progress: Callable[[str], None]) -> Tokens:
    directory: Path = locate_model(model, progress)
    progress("gateway: loading the tokenizer")
    return Tokens.load(directory)


def _load_http(
    settings: GatewayConfig, desk: Desk, files: ServerFiles | None, progress: Callable[[str], None]
) -> HttpServer:
    """Imported only where it is served: OpenAI's types take a second or two."""
    progress("gateway: loading the HTTP API")
    from branchline.wire.http_server import HttpServer
    from gateway.http.app import application
    from gateway.http.connection import bounded_protocol

    tls = server_context(files) if files else None
    app = application(desk, settings.max_http_requests)
    protocol = bounded_protocol(settings.max_http_connections)
    return HttpServer(app, settings.host, settings.http_port, protocol=protocol, tls=tls)


def _load_parsers(settings: GatewayConfig, tokens: Tokens, progress: Callable[[str], None]) -> Parsers | None:
    if not (settings.tool_parser or settings.reasoning_parser):
        return None
    progress("gateway: loading vLLM's parsers")
    from gateway.vllm_parsers import VllmParsers

    return VllmParsers(tokens.tokenizer, settings.tool_parser, settings.reasoning_parser)


async def _workers_ready(
    models: Sequence[Model], stop: asyncio.Event, timeout_s: float, progress: Callable[[str], None]
) -> bool:
    """Waits until each model has one pair that can share KV; False when `stop` was set first."""
    await asyncio.sleep(0)  # the pools take their addresses in the loop's next turn
    until = time.monotonic() + timeout_s
    report_at = time.monotonic()
    while late := [model for model in models if not model.can_serve]:
        if stop.is_set():
            return False
        pool = late[0].backend.pool
        of = f" for {late[0].name}" if len(models) > 1 else ""
        lacking = pool.pairs().misfit or f"waiting for {_missing(pool)}{of}"
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
