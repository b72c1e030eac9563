"""Starts and stops a decode worker inside the running event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any

from branchline.config import Config
from branchline.engine.assemble import assemble
from branchline.engine.decode import DecodeRunner
from branchline.engine.thread import EngineThread
from branchline.v1 import decode_pb2_grpc
from branchline.wire.server import RpcServer
from decode_worker.engine_loop import DecodeLoop
from decode_worker.leases import LeaseTable
from decode_worker.service import SERVICE, DecodeService
from decode_worker.sessions import Sessions

#: Seconds that the engine has for its last commands, a step in progress or the end of loading included.
STOP_S = 30.0
#: Seconds that calls have to end by themselves once their leases have been aborted.
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
    thread = EngineThread("decode-engine")
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
    config: Config, thread: EngineThread, engine: DecodeLoop, ready: Callable[[str], None], stopping: asyncio.Task[bool]
) -> None:
    table = LeaseTable(incarnation=secrets.token_hex(8), ttl_s=config.decode.lease_ttl_s)
    sessions = Sessions(thread, engine, table)
    server = RpcServer(config.decode.host, config.decode.port)
    server.add(SERVICE, DecodeService(sessions), decode_pb2_grpc.add_DecodeServiceServicer_to_server)
    expiry = asyncio.create_task(_expire(sessions))
    try:
        ready(await server.start())
        await _first_of(stopping, thread.failed, expiry)
        for ended in (thread.failed, expiry):
            if ended.done():
                ended.result()  # raises: neither ends by itself
    finally:
        expiry.cancel()
        sessions.close("the worker is stopping")
        await server.stop(GRACE_S)
        if not thread.failed.done():
            await asyncio.wait_for(thread.submit(engine.close), STOP_S)


def _build(config: Config, thread: EngineThread, progress: Callable[[str], None]) -> DecodeLoop:
    """On the engine's thread: what it loads it owns."""
    models, tree = assemble(config, progress)
    engine = DecodeLoop(models, tree, DecodeRunner(models, config.engine, tree))
    thread.use(engine.step)
    return engine


async def _expire(sessions: Sessions) -> None:
    """Looks often enough that a lease outlives its time by a tenth at most."""
    while True:
        await asyncio.sleep(sessions.table.ttl_s / 10)
        sessions.expire()


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
