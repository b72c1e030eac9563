"""The Ray actor: a thin shell around a role's `serve`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import ray

from branchline.config import Config
from branchline.observe import logs
from branchline.wire.memory import keep_large_buffers
from cluster.shell import RoleThread, State, Status

WILDCARD_HOSTS = ("0.0.0.0", "[::]", "::")


class WorkerPool(Protocol):
    """The part of a gateway's pool that is used here."""

    def update(self, prefill: Sequence[str], decode: Sequence[str]) -> None: ...


@dataclass(frozen=True)
class ActorInfo:
    """Where an actor runs and what it has claimed."""

    pid: int
    node_ip: str
    gpu_ids: tuple[str, ...]
    #: Cores that the process may use.
    cores: tuple[int, ...]


class RoleActor:
    """Owns one role's thread. Every method returns at once, except `stop`.

    Ray starts a new process when this one dies, and runs `__init__` there; the supervisor sees that the
    new one is idle and calls `start` again, with the configuration of that moment.
    """

    def __init__(self, serve_path: str, *, routes: bool = False) -> None:
        """`routes`: the role sends requests to workers, and can be told their addresses (a gateway)."""
        if not routes:
            keep_large_buffers()  # KV frames
        self._name = serve_path.partition(".")[0].removesuffix("_worker")
        self._role = RoleThread(serve_path)
        self._routes = routes
        self._pool: WorkerPool | None = None
        self._workers: tuple[Sequence[str], Sequence[str]] = ((), ())

    def start(self, config: Config, cores: Sequence[int]) -> None:
        """Begins to serve, unless it does already."""
        logs.set_up(config.logging, self._name, logging.WARNING)
        if self._routes:
            self._role.start(config, cores, on_pool=self._take_pool)
        else:
            self._role.start(config, cores)

    def status(self, since: int) -> Status:
        """State, address and the progress lines from number `since` on."""
        status = self._role.status(since)
        if status.state is not State.READY:
            return status
        node_ip = ray.util.get_node_ip_address()
        return replace(status, address=reachable(status.address, node_ip), http=reachable(status.http, node_ip))

    def info(self) -> ActorInfo:
        return ActorInfo(
            pid=os.getpid(),
            node_ip=ray.util.get_node_ip_address(),
            gpu_ids=tuple(str(gpu) for gpu in ray.get_gpu_ids()),
            cores=tuple(sorted(os.sched_getaffinity(0))),
        )

    def update_workers(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """Tells a gateway where the workers are now; it may be loading still."""
        self._workers = (prefill, decode)
        if self._pool is not None:
            self._pool.update(prefill, decode)

    def stop(self, grace_s: float) -> bool:
        """Ends `serve`; True when it ended within `grace_s` seconds."""
        return self._role.stop(grace_s)

    def _take_pool(self, pool: WorkerPool) -> None:
        """In the role's thread. Each side sets its own first and then reads the other's, so none is missed."""
        self._pool = pool
        pool.update(*self._workers)


def reachable(address: str, node_ip: str) -> str:
    """The address with a wildcard host replaced by the node's own, so that other nodes can use it."""
    host, _, port = address.rpartition(":")
    return f"{node_ip}:{port}" if host in WILDCARD_HOSTS else address
