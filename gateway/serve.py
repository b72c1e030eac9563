"""A gateway from start to stop, in any event loop: a process of its own or a Ray actor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import branchline.v1.gateway_pb2_grpc as gateway_pb2_grpc
from branchline.config import Config
from branchline.engine.models.locate import locate_model
from branchline.wire.server import RpcServer
from gateway.backend import Backend
from gateway.pool import WorkerPool, WorkersNotReadyError
from gateway.service import GatewayService
from gateway.tokens import Tokens

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
    ready: Callable[[str], None],
    stop: asyncio.Event,
    progress: Callable[[str], None] = _silent,
    on_pool: Callable[[WorkerPool], None] = _nobody,
) -> None:
    """Serves until `stop` is set; calls `ready("HOST:PORT")` when the first request can be answered.

    `on_pool` gets the pool of workers as soon as it exists: its `update` may then be called from any thread when
    addresses change. Raises ModelError, BindError, WorkersNotReadyError, or InvalidRequestError for an address of a
    worker that is not HOST:PORT. Everything is closed when it returns or raises.
    """
    tokens = await asyncio.to_thread(_load_tokens, config.model.model, progress)
    backend = Backend(config.gateway)
    server = RpcServer(config.gateway.host, config.gateway.grpc_port)
    try:
        backend.pool.update(config.gateway.prefill_workers, config.gateway.decode_workers)
        on_pool(backend.pool)
        service = GatewayService(backend, tokens, config.model.model)
        server.add(SERVICE, service, gateway_pb2_grpc.add_GatewayServiceServicer_to_server)
        if await _workers_ready(backend.pool, stop, config.ray.start_timeout_s, progress):
            ready(await server.start())
            await stop.wait()
    finally:
        await server.stop(grace_s=0)
        await backend.close()
        tokens.close()


def _load_tokens(model: str, progress: Callable[[str], None]) -> Tokens:
    directory: Path = locate_model(model, progress)
    progress("gateway: loading the tokenizer")
    return Tokens.load(directory)


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
