"""Starts and stops a decode worker inside the running event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from branchline.config import Config
from branchline.engine.assemble import assemble
from branchline.engine.decode import DecodeRunner
from branchline.engine.hosting import Host, hosted_engine
from branchline.engine.load_budget import LoadBudget
from branchline.observe.exposition import exposed
from branchline.observe.tracing import tracing
from branchline.v1 import decode_pb2_grpc
from branchline.wire.server import RpcServer
from branchline.wire.tls import ServerFiles, inside_files, server_credentials
from branchline.workload import Workload, nobody
from decode_worker.engine_loop import DecodeLoop
from decode_worker.leases import LeaseState, LeaseTable
from decode_worker.metrics import decode_registry
from decode_worker.service import PARSERS, SERVICE, DecodeService
from decode_worker.sessions import Sessions

#: Seconds that calls have to end by themselves once their leases have been aborted.
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

    def build() -> DecodeLoop:
        models, tree = assemble(config, progress)
        adaptive = config.engine.adaptive_tree and tree.num_nodes > 0
        load_budget = LoadBudget(tree.num_nodes) if adaptive else None
        return DecodeLoop(models, tree, DecodeRunner(models, config.engine, tree, load_budget=load_budget))

    files = inside_files(config.security.inside)
    server_credentials(files)  # a mistake is told at once
    async with hosted_engine("decode-engine", build, stop) as host:
        if host is not None:
            await _serve(config, host, ready, progress, files, on_load)


async def _serve(
    config: Config,
    host: Host[DecodeLoop],
    ready: Callable[[str], None],
    progress: Callable[[str], None],
    files: ServerFiles | None,
    on_load: Callable[[Callable[[], Workload]], None],
) -> None:
    own = config.decode
    table = LeaseTable(incarnation=secrets.token_hex(8), ttl_s=own.lease_ttl_s)
    sessions = Sessions(host.thread, host.engine, table)
    on_load(lambda: _workload(sessions))
    async with tracing(config.tracing, "decode", table.incarnation) as tracer:
        server = RpcServer(own.host, own.port, server_credentials(files))
        service = DecodeService(sessions, tracer)
        server.add(SERVICE, service, decode_pb2_grpc.add_DecodeServiceServicer_to_server, PARSERS)
        expiry = asyncio.create_task(_expire(sessions))
        try:
            async with exposed(decode_registry(sessions), own.host, own.metrics_port, progress, files):
                ready(await server.start())
                await host.until_stopped(expiry)
        finally:
            expiry.cancel()
            sessions.close("the worker is stopping")
            await server.stop(GRACE_S)


async def _expire(sessions: Sessions) -> None:
    """Looks often enough that a lease outlives its time by a tenth at most."""
    while True:
        await asyncio.sleep(sessions.table.ttl_s / 10)
        sessions.live.expire()


def _workload(sessions: Sessions) -> Workload:
    engine, waiting = sessions.engine, len(sessions.waiting)
    return Workload(
        running=sessions.table.count(LeaseState.RUNNING),
        queued=waiting,
        unfinished=len(sessions.table) + waiting,
        blocks_used=engine.runner.pool.used,
        blocks_total=engine.runner.pool.total,
        tokens=sessions.totals.emitted_tokens,
        speculation=sessions.totals.speculation,
        fingerprint=engine.models.fingerprint,
    )
