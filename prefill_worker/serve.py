"""Starts and stops a prefill worker inside the running event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from branchline.config import Config
from branchline.engine.assemble import assemble
from branchline.engine.hosting import Host, hosted_engine
from branchline.engine.prefill import PrefillRunner
from branchline.observe.exposition import exposed
from branchline.observe.tracing import tracing
from branchline.v1 import prefill_pb2_grpc
from branchline.wire.server import RpcServer
from branchline.wire.tls import ServerFiles, channel_tls, inside_files, server_credentials
from branchline.workload import Workload, nobody
from prefill_worker.channels import DecodeChannels
from prefill_worker.engine_loop import PrefillLoop
from prefill_worker.service import SERVICE, PrefillService

#: Seconds that requests have to end by themselves before they are cancelled.
GRACE_S = 1.0

logger = logging.getLogger(__name__)


async def serve(
    config: Config,
    *,
    ready: Callable[[str], None],
    stop: asyncio.Event,
    progress: Callable[[str], None] = logger.info,
    on_load: Callable[[Callable[[], Workload]], None] = nobody,
) -> None:
    """Loads the models, calls `ready("HOST:PORT")`, serves until `stop` is set, frees everything and returns.

    `on_load` gets, before that, what tells the worker's load, to be called on this event loop. Raises ConfigError,
    ModelError or BindError when it can't start, and what the engine raised when that failed for good.
    """

    def build() -> PrefillLoop:
        models, tree = assemble(config, progress)
        return PrefillLoop(models, PrefillRunner(models, config.engine, tree), config.engine.prefill_chunk_tokens)

    files = inside_files(config.security.inside)
    server_credentials(files)  # a mistake is told at once
    channels = DecodeChannels(config.transfer.streams, channel_tls(config.security.inside))
    async with hosted_engine("prefill-engine", build, stop) as host:
        if host is not None:
            await _serve(config, host, ready, progress, files, channels, on_load)


async def _serve(
    config: Config,
    host: Host[PrefillLoop],
    ready: Callable[[str], None],
    progress: Callable[[str], None],
    files: ServerFiles | None,
    channels: DecodeChannels,
    on_load: Callable[[Callable[[], Workload]], None],
) -> None:
    incarnation, own = secrets.token_hex(8), config.prefill
    async with tracing(config.tracing, "prefill", incarnation) as tracer:
        service = PrefillService(host.thread, host.engine, incarnation, own.lease_ttl_s, channels, tracer)
        on_load(service.workload)
        server = RpcServer(own.host, own.port, server_credentials(files))
        server.add(SERVICE, service, prefill_pb2_grpc.add_PrefillServiceServicer_to_server)
        try:
            async with exposed(service.registry, own.host, own.metrics_port, progress, files):
                ready(await server.start())
                await host.until_stopped()
        finally:
            await server.stop(GRACE_S)
            await service.close()
