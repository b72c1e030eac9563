"""Roles for tests of placement and supervision: real gRPC servers without a model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from branchline.config import Config, ConfigError
from branchline.core import Fingerprint
from branchline.workload import Workload


async def worker(
    config: Config,
    *,
    ready: Callable[[str], None],
    stop: asyncio.Event,
    progress: Callable[[str], None],
    on_load: Callable[[Callable[[], Workload]], None],
) -> None:
    """Serves only the health service; with a draft head `missing` it can't."""
    if config.model.draft == "missing":
        raise ConfigError("model.draft: missing: there is no such draft head")
    progress(f"loading with {os.environ['OMP_NUM_THREADS']} threads, {os.environ['OMP_WAIT_POLICY']}")
    busy = os.environ.get("BRANCHLINE_TEST_BUSY", "")  # a file: while it exists there is something to finish
    fingerprint = Fingerprint({"block": str(config.transfer.streams)})  # as if streams decided what workers can share
    on_load(lambda: Workload(unfinished=int(bool(busy) and os.path.exists(busy)), fingerprint=fingerprint))
    await _serve_health(config.decode.host, 0, ready, stop)


async def gateway(
    config: Config,
    *,
    ready: Callable[[str], None],
    stop: asyncio.Event,
    progress: Callable[[str], None],
    on_pools: Callable[[Mapping[str, Pool]], None],
    on_load: Callable[[Callable[[], Workload]], None],
    on_drain: Callable[[Callable[[], None]], None],
) -> None:
    """Serves only the health service, on its own port, and says what workers it is given."""
    pool = Pool(progress)
    pool.update(config.gateway.prefill_workers, config.gateway.decode_workers)
    on_pools({"": pool})
    on_load(Workload)
    on_drain(lambda: progress("drains"))
    await _serve_health(config.gateway.host, config.gateway.grpc_port, ready, stop)


class Pool:
    """Where a gateway's worker addresses go."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress

    def update(self, prefill: Sequence[str], decode: Sequence[str], draining: Sequence[str] = ()) -> None:
        leaving = f" | {' '.join(draining)} drain" if draining else ""
        self._progress(f"workers {' '.join(prefill)} | {' '.join(decode)}{leaving}")


async def misconfigured(_config: Config, **_arguments: Any) -> None:
    raise ConfigError("model.model: /nowhere has no weights")


async def broken(_config: Config, **_arguments: Any) -> None:
    raise ZeroDivisionError("an accident")


async def suicidal(_config: Config, **_arguments: Any) -> None:
    os.abort()


async def stubborn(_config: Config, *, ready: Callable[[str], None], **_arguments: Any) -> None:
    """Gets ready and doesn't heed `stop`."""
    ready("127.0.0.1:1")
    await asyncio.sleep(600)


async def _serve_health(host: str, port: int, ready: Callable[[str], None], stop: asyncio.Event) -> None:
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"{host}:{port}")
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    ready(f"{host}:{bound}")
    await stop.wait()
    await server.stop(0.5)
