"""Which actors a configuration needs, what each may use, and their creation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from branchline.config import CORES_TO_SHARE_OUT, Config, ConfigError
from cluster.actors import RoleActor

#: Import paths of the roles' `serve` coroutines.
SERVE_PATHS = {
    "prefill": "prefill_worker.serve:serve",
    "decode": "decode_worker.serve:serve",
    "gateway": "gateway.serve:serve",
}
WORKER_ROLES = ("prefill", "decode")
PORT_FIELDS = {"prefill": "prefill.port", "decode": "decode.port", "gateway": "gateway.grpc_port"}

#: Read by libraries when they are imported, so they are set for the process rather than in it. Waiting OpenMP
#: threads must not spin, or two workers on the same cores stall each other.
PROCESS_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Seat:
    """One actor to be: its role, its number among its role, its share of the machine."""

    role: str
    index: int
    serve_path: str
    #: The configuration with this actor's own port and thread count.
    config: Config
    num_cpus: float
    num_gpus: float
    #: Cores to be pinned to; empty for no pinning.
    cores: tuple[int, ...] = ()
    #: The custom resource that it claims one of; empty for none.
    resource: str = ""

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"


def plan(config: Config, cores: Sequence[int] = (), serve_paths: Mapping[str, str] = SERVE_PATHS) -> list[Seat]:
    """The actors for a configuration, workers first, gateways last. Raises ConfigError for a claim that can't work.

    `cores` are those that a local Ray may use: with enough of them each CPU worker gets its own. On a Ray that
    others use too (no cores given) nothing is pinned, and a worker computes with as many threads as it claims CPUs.
    A fixed port belongs to a role's first actor; the next ones count up from it. With a custom resource all have the
    same: each is on a node of its own.
    """
    shares = _share_cores(config, cores)
    seats = []
    for role in (*WORKER_ROLES, "gateway"):
        part = getattr(config, role)
        if role != "gateway" and config.model.device == "cuda" and part.num_gpus == 0:
            raise ConfigError(f"{role}.num_gpus: must be above 0 with model.device cuda: Ray hides unclaimed GPUs")
        base_port = part.grpc_port if role == "gateway" else part.port
        for index in range(part.replicas):
            pinned = shares.get((role, index), ())
            usable = len(pinned or cores) or math.floor(part.num_cpus)
            threads = config.engine.threads_for(role, usable, shared=bool(cores) and not pinned)
            # With a resource of their own they are on different nodes.
            offset = 0 if part.resource else index
            own = config.override(**{PORT_FIELDS[role]: _counted(base_port, offset), "engine.threads": threads})
            if role == "gateway":
                own = own.override(**{"gateway.http_port": _counted(part.http_port, offset)})
            own = own.override(**{f"{role}.metrics_port": _counted(part.metrics_port, offset)})
            gpus = 0.0 if role == "gateway" else part.num_gpus
            seats.append(Seat(role, index, serve_paths[role], own, part.num_cpus, gpus, pinned, part.resource))
    return seats


def _counted(port: int, offset: int) -> int:
    """A fixed port counts up; 0 (any) and -1 (none) stay."""
    return port + offset if port > 0 else port


def needed_cpus(seats: Sequence[Seat]) -> float:
    return sum(seat.num_cpus for seat in seats)


def needed_gpus(seats: Sequence[Seat]) -> float:
    return sum(seat.num_gpus for seat in seats)


def needed_resources(seats: Sequence[Seat]) -> dict[str, float]:
    """What all claim together, by Ray's names: CPU, GPU and the custom resources."""
    custom = Counter(seat.resource for seat in seats if seat.resource)
    return {"CPU": needed_cpus(seats), "GPU": needed_gpus(seats), **custom}


def create_actor(seat: Seat, env: Mapping[str, str]) -> Any:
    """Creates the seat's actor, idle, and returns its handle. `env` is laid over the usual variables."""
    env_vars = {**PROCESS_ENV, "OMP_NUM_THREADS": str(seat.config.engine.threads), **env}
    actor = ray.remote(RoleActor).options(
        num_cpus=seat.num_cpus,
        num_gpus=seat.num_gpus,
        resources={seat.resource: 1} if seat.resource else {},
        # A killed process comes back as often as it takes; the supervisor slows down one that keeps failing.
        max_restarts=-1,
        max_task_retries=0,
        runtime_env={"env_vars": env_vars},
    )
    return actor.remote(seat.serve_path, routes=seat.role == "gateway")


def _share_cores(config: Config, cores: Sequence[int]) -> dict[tuple[str, int], tuple[int, ...]]:
    """Divides the cores among the CPU workers by their `num_cpus`; empty when there are too few to divide.

    Gateways are not pinned: they wait for the network most of the time.
    """
    workers = [
        (role, index)
        for role in WORKER_ROLES
        if getattr(config, role).num_gpus == 0
        for index in range(getattr(config, role).replicas)
    ]
    if len(cores) < max(CORES_TO_SHARE_OUT, len(workers)) or not workers:
        return {}
    weights = [max(getattr(config, role).num_cpus, 1.0) for role, _ in workers]
    shares, taken, weight = {}, 0, 0.0
    for number, worker in enumerate(workers, start=1):
        weight += weights[number - 1]
        end = round(len(cores) * weight / sum(weights))
        # At least one core each, and one left for each that follows.
        end = min(max(end, taken + 1), len(cores) - (len(workers) - number))
        shares[worker] = tuple(cores[taken:end])
        taken = end
    return shares
