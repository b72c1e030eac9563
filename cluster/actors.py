"""The Ray actor: a thin shell around a role's `serve`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray

from branchline.config import Config
from branchline.observe import logs
from branchline.wire.memory import keep_large_buffers
from cluster.placement import Seat
from cluster.shell import RoleThread, State, Status

#: Read by libraries when they are imported, so they are set for the process rather than in it. Waiting OpenMP
#: threads must not spin, or two workers on the same cores stall each other.
PROCESS_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
WILDCARD_HOSTS = ("0.0.0.0", "[::]", "::")


class WorkerPool(Protocol):
    """The part of a gateway's pool that is used here."""

    def update(self, prefill: Sequence[str], decode: Sequence[str], draining: Sequence[str]) -> None: ...


@dataclass(frozen=True)
class News:
    """Where the workers are: pairs of a model, as `Config.each` names it, and an address."""

    prefill: tuple[tuple[str, str], ...] = ()
    decode: tuple[tuple[str, str], ...] = ()
    #: Addresses of those that are given nothing new.
    draining: tuple[str, ...] = ()

    def of(self, model: str) -> tuple[list[str], list[str], list[str]]:
        """What the pool of one model has to know: the prefill and the decode workers' addresses, and `draining`."""
        prefill, decode = ([address for each, address in role if each == model] for role in (self.prefill, self.decode))
        return prefill, decode, list(self.draining)


@dataclass(frozen=True)
class ActorInfo:
    """Where an actor runs and what it has claimed."""

    pid: int
    node_ip: str
    node_id: str
    gpu_ids: tuple[str, ...]
    #: Cores that the process may use.
    cores: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """To "who are you, and how is it going"."""

    info: ActorInfo
    status: Status


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
        self._pools: Mapping[str, WorkerPool] = {}
        self._workers = News()
        self._drain: Callable[[], None] | None = None

    def start(self, config: Config, cores: Sequence[int]) -> None:
        """Begins to serve, unless it does already."""
        logs.set_up(config.logging, self._name, logging.WARNING)
        if self._routes:
            self._role.start(config, cores, on_pools=self._take_pools, on_drain=self._take_drain)
        else:
            self._role.start(config, cores)

    def status(self, since: int) -> Answer:
        """State, address, load and the progress lines from number `since` on."""
        info, status = self.info(), self._role.status(since)
        if status.state is State.READY:
            address, http = (reachable(address, info.node_ip) for address in (status.address, status.http))
            status = replace(status, address=address, http=http)
        return Answer(info, status)

    def info(self) -> ActorInfo:
        return ActorInfo(
            pid=os.getpid(),
            node_ip=ray.util.get_node_ip_address(),
            node_id=ray.get_runtime_context().get_node_id(),
            gpu_ids=tuple(str(gpu) for gpu in ray.get_gpu_ids()),
            cores=tuple(sorted(os.sched_getaffinity(0))),
        )

    def update_workers(self, news: News) -> None:
        """Tells a gateway where the workers are now; it may be loading still."""
        self._workers = news
        self._tell_pools()

    def drain(self) -> None:
        """Makes a gateway let nobody in any more; it goes on with the requests that it has."""
        if self._drain is not None:
            self._role.call(self._drain)

    def stop(self, grace_s: float) -> bool:
        """Ends `serve`; True when it ended within `grace_s` seconds."""
        return self._role.stop(grace_s)

    def _take_pools(self, pools: Mapping[str, WorkerPool]) -> None:
        """In the role's thread. Each side sets its own first and then reads the other's, so none is missed."""
        self._pools = pools
        self._tell_pools()

    def _tell_pools(self) -> None:
        for model, pool in self._pools.items():
            pool.update(*self._workers.of(model))

    def _take_drain(self, drain: Callable[[], None]) -> None:
        self._drain = drain


def create_actor(seat: Seat, env: Mapping[str, str], strategy: Any = None) -> Any:
    """Creates the seat's actor, idle, and returns its handle. `env` is laid over the usual variables; `strategy` is
    Ray's for scheduling, None for its own choice.
    """
    env_vars = {**PROCESS_ENV, "OMP_NUM_THREADS": str(seat.config.engine.threads), **env}
    claims = seat.claims
    actor = ray.remote(RoleActor).options(
        num_cpus=claims.num_cpus,
        num_gpus=claims.num_gpus,
        memory=claims.resources.get("memory"),
        resources={claims.resource: 1} if claims.resource else {},
        # With a strategy the place has been chosen by them already.
        label_selector=dict(claims.labels) if claims.labels and strategy is None else None,
        scheduling_strategy=strategy,
        # A killed process comes back as often as it takes; the supervisor slows down one that keeps failing.
        max_restarts=-1,
        max_task_retries=0,
        runtime_env={"env_vars": env_vars},
    )
    return actor.remote(seat.serve_path, routes=seat.role == "gateway")


def reachable(address: str, node_ip: str) -> str:
    """The address with a wildcard host replaced by the node's own, so that other nodes can use it."""
    host, _, port = address.rpartition(":")
    return f"{node_ip}:{port}" if host in WILDCARD_HOSTS else address
