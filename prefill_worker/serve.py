"""Starts and stops a prefill worker inside the running event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any

from branchline.config import Config
from branchline.engine.assemble import assemble
from branchline.engine.prefill import PrefillRunner
from branchline.engine.thread import EngineThread
from branchline.v1 import prefill_pb2_grpc
from branchline.wire.server import RpcServer
from prefill_worker.engine_loop import PrefillLoop
from prefill_worker.service import SERVICE, PrefillService

#: Seconds that the engine has for its last commands, a step in progress or the end of loading included.
STOP_S = 30.0
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
    thread = EngineThread("prefill-engine")
    stopping = asyncio.create_task(stop.wait())
    try:
        loading = thread.submit(_build, config, thread, progress)
        await _first_of(loading, stopping)
        if not stop.is_set():
            await _serve(config, thread, loading.result(), ready, stopping)
    finally:
        stopping.cancel()
        if not await thread.stop(STOP_S):
            logger.error("the engine's thread did not end within %g s", STOP_S)


async def _serve(
    config: Config,
    thread: EngineThread,
    engine: PrefillLoop,
    ready: Callable[[str], None],
    stopping: asyncio.Task[bool],
) -> None:
    service = PrefillService(thread, engine, secrets.token_hex(8), config.prefill.lease_ttl_s)
    server = RpcServer(config.prefill.host, config.prefill.port)
    server.add(SERVICE, service, prefill_pb2_grpc.add_PrefillServiceServicer_to_server)
    try:
        ready(await server.start())
        await _first_of(stopping, thread.failed)
        if thread.failed.done():
            thread.failed.result()  # raises
    finally:
        await server.stop(GRACE_S)
        await service.close()
        if not thread.failed.done():
            await asyncio.wait_for(thread.submit(engine.close), STOP_S)


def _build(config: Config, thread: EngineThread, progress: Callable[[str], None]) -> PrefillLoop:
    """On the engine's thread: what it loads it owns."""
    models, tree = assemble(config, progress)
    engine = PrefillLoop(models, PrefillRunner(models, config.engine, tree))
    thread.use(engine.step)
    return engine


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
