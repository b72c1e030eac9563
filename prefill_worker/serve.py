"""Starts and stops a prefill worker inside the running event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

import grpc

from branchline.config import Config
from branchline.engine.assemble import assemble
from branchline.engine.hosting import Host, hosted_engine
from branchline.engine.prefill import PrefillRunner
from branchline.v1 import prefill_pb2_grpc
from branchline.wire.server import RpcServer
from branchline.wire.tls import channel_tls, inside_files, server_credentials
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
) -> None:
    """Loads the models, calls `ready("HOST:PORT")`, serves until `stop` is set, frees everything and returns.

    Raises ConfigError, ModelError or BindError when it can't start, and what the engine raised when that failed
    for good.
    """

    def build() -> PrefillLoop:
        models, tree = assemble(config, progress)
        return PrefillLoop(models, PrefillRunner(models, config.engine, tree), config.engine.prefill_chunk_tokens)

    credentials = server_credentials(inside_files(config.security.inside))
    channels = DecodeChannels(config.transfer.streams, channel_tls(config.security.inside))
    async with hosted_engine("prefill-engine", build, stop) as host:
        if host is not None:
            await _serve(config, host, ready, credentials, channels)


async def _serve(
    config: Config,
    host: Host[PrefillLoop],
    ready: Callable[[str], None],
    credentials: grpc.ServerCredentials | None,
    channels: DecodeChannels,
) -> None:
    service = PrefillService(host.thread, host.engine, secrets.token_hex(8), config.prefill.lease_ttl_s, channels)
    server = RpcServer(config.prefill.host, config.prefill.port, credentials)
    server.add(SERVICE, service, prefill_pb2_grpc.add_PrefillServiceServicer_to_server)
    try:
        ready(await server.start())
        await host.until_stopped()
    finally:
        await server.stop(GRACE_S)
        await service.close()
