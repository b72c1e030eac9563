"""Which actors a configuration needs, and what each may use."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from branchline.config import CORES_TO_SHARE_OUT, Config, ConfigError, GatewayConfig, WorkerConfig

#: Import paths of the roles' `serve` coroutines.
SERVE_PATHS = {
    "prefill": "prefill_worker.serve:serve",
    "decode": "decode_worker.serve:serve",
    "gateway": "gateway.serve:serve",
}
WORKER_ROLES = ("prefill", "decode")
ROLES = (*WORKER_ROLES, "gateway")
MIB = 2**20
PORT_FIELDS = {"prefill": "prefill.port", "decode": "decode.port", "gateway": "gateway.grpc_port"}


@dataclass(frozen=True)
class Claims:
    """What Ray keeps for an actor on its node."""

    num_cpus: float
    num_gpus: float = 0.0
    memory_mib: int = 0
    #: The custom resource that it claims one of; empty for none.
    resource: str = ""
    #: Ray's label selectors.
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names, without what isn't claimed; memory in bytes."""
        claims = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": float(self.memory_mib * MIB)}
        claims |= {self.resource: 1.0} if self.resource else {}
        return {name: amount for name, amount in claims.items() if amount > 0}


@dataclass(frozen=True)
class Seat:
    """One actor to be: its role, its number among its role, its share of the machine."""

    role: str
    #: No other actor of the role has, or has had, this number.
    index: int
    serve_path: str
    #: The configuration with this actor's own port and thread count.
    config: Config
    claims: Claims
    #: Cores to be pinned to; empty for no pinning, or for a choice when its node is known.
    cores: tuple[int, ...] = ()
    #: How many cores of its own it should have on its node; 0 for none.
    share: int = 0
    #: Its place among those of its role that there are now: fixed ports count up with it.
    slot: int = 0
    #: The plan's that it was made from.
    revision: int = 0
    #: Which it serves, as `Config.each` names it; a gateway serves all.
    model: str = ""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


@dataclass(frozen=True)
class Plan:
    """Makes the seats of a system, the first ones and later ones.

    `cores` are those that a local Ray may use: with enough of them each CPU worker gets its own. On a Ray that
    others use too (no cores given) a worker computes with as many threads as it claims CPUs, on cores of its own
    where its node has enough. A fixed port belongs to a role's first actor; the next ones count up from it. With a
    custom resource all have the same: each is on a node of its own.
    """

    config: Config
    cores: tuple[int, ...] = ()
    serve_paths: Mapping[str, str] = field(default_factory=lambda: SERVE_PATHS)
    #: Counts the changes of configuration while the system runs.
    revision: int = 0

    @property
    def local(self) -> bool:
        return bool(self.cores)

    def first(self) -> list[Seat]:
        """Workers first, gateways last. Raises ConfigError for a claim that can't work."""
        self.check()
        configs, shares = self.config.each(), _share_cores(self.config, self.cores)
        seats = []
        for role in ROLES:
            places = [(model, slot) for model in _models(configs, role)
                      for slot in range(part_of(configs[model], role).replicas)]  # fmt: skip
            for index, (model, slot) in enumerate(places):
                pinned, claims = shares.get((role, index), ()), _claims(part_of(configs[model], role))
                seats.append(self._seat(role, index, slot, pinned, claims, model))
        return seats

    def seat(self, role: str, index: int, slot: int, model: str = "") -> Seat:
        """A later one. A local Ray offers no more CPUs than the first ones claim, so that a later one claims none."""
        claims = _claims(part_of(self.config.each()[model], role))
        if self.local:
            claims = Claims(0.0, claims.num_gpus, claims.memory_mib, claims.resource, claims.labels)
        return self._seat(role, index, slot, (), claims, model)

    def check(self) -> None:
        """Raises ConfigError for a claim that can't work."""
        configs = self.config.each()
        for role in ROLES:
            for model in _models(configs, role):
                try:
                    self._check(role, configs[model])
                except ConfigError as error:
                    raise ConfigError(f"others.{model}.{error}" if model else str(error)) from None

    def _check(self, role: str, config: Config) -> None:
        part = part_of(config, role)
        claims = _claims(part)
        if role != "gateway" and config.model.device == "cuda" and claims.num_gpus == 0:
            raise ConfigError(f"{role}.num_gpus: must be above 0 with model.device cuda: Ray hides unclaimed GPUs")
        if config.ray.placement != "none" and role != "gateway" and not claims.resources:
            raise ConfigError(f"{role}.num_cpus: must be above 0 with ray.placement {config.ray.placement}")
        if self.local and part.resource:
            raise ConfigError(f"{role}.resource: a Ray that is started here offers no {part.resource!r}")
        if self.local and part.labels:
            raise ConfigError(f"{role}.labels: a Ray that is started here has no labels, got {list(part.labels)}")

    def threads(self, seat: Seat, cores: int) -> int:
        """Compute threads of a worker that has so many cores to itself."""
        engine = self.config.each()[seat.model].engine
        return min(engine.threads_for(seat.role, cores, shared=False), max(1, cores))

    def changed(self, config: Config) -> Plan:
        """The next revision."""
        return dataclasses.replace(self, config=config, revision=self.revision + 1)

    def _seat(self, role: str, index: int, slot: int, pinned: tuple[int, ...], claims: Claims, model: str) -> Seat:
        config = self.config if role == "gateway" else self.config.each()[model]
        part = part_of(config, role)
        usable = len(pinned or self.cores) or math.floor(part.num_cpus)
        threads = config.engine.threads_for(role, usable, shared=self.local and not pinned)
        # With a resource of their own they are on different nodes.
        offset = 0 if part.resource else slot
        names = ("grpc_port", "http_port") if role == "gateway" else ("port",)
        ports = {f"{role}.{name}": _counted(getattr(part, name), offset) for name in (*names, "metrics_port")}
        own = config.override(**{"engine.threads": threads}, **ports)
        share, path = self._share(role, part), self.serve_paths[role]
        return Seat(role, index, path, own, claims, pinned, share, slot, self.revision, model)

    def _share(self, role: str, part: WorkerConfig | GatewayConfig) -> int:
        """Gateways are not pinned: they wait for the network most of the time. Neither are workers on GPUs."""
        if not isinstance(part, WorkerConfig) or part.num_gpus > 0 or not self.config.ray.pin_cores:
            return 0
        if self.local:
            return len(_share_cores(self.config, self.cores).get((role, 0), ()))
        return max(1, math.floor(part.num_cpus))


def part_of(config: Config, role: str) -> WorkerConfig | GatewayConfig:
    """A role's section."""
    part: WorkerConfig | GatewayConfig = getattr(config, role)
    return part


def _models(configs: Mapping[str, Config], role: str) -> Sequence[str]:
    """Those that a role has processes for; a gateway serves all."""
    return [""] if role == "gateway" else list(configs)


def _claims(part: WorkerConfig | GatewayConfig) -> Claims:
    gpus = part.num_gpus if isinstance(part, WorkerConfig) else 0.0
    labels = {key: value for key, _, value in (label.partition("=") for label in part.labels)}
    return Claims(part.num_cpus, gpus, part.memory_mib, part.resource, labels)


def plan(config: Config, cores: Sequence[int] = (), serve_paths: Mapping[str, str] = SERVE_PATHS) -> list[Seat]:
    """The first seats for a configuration. Raises ConfigError for a claim that can't work."""
    return Plan(config, tuple(cores), serve_paths).first()


def _counted(port: int, offset: int) -> int:
    """A fixed port counts up; 0 (any) and -1 (none) stay."""
    return port + offset if port > 0 else port


def needed_resources(seats: Sequence[Seat]) -> dict[str, float]:
    """What all claim together, by Ray's names: CPU, GPU, memory and the custom resources."""
    needed: Counter[str] = Counter()
    for seat in seats:
        needed.update(seat.claims.resources)
    return {"CPU": 0.0, "GPU": 0.0, **needed}


def _share_cores(config: Config, cores: Sequence[int]) -> dict[tuple[str, int], tuple[int, ...]]:
    """Divides the cores among the CPU workers by their `num_cpus`; empty when there are too few to divide."""
    claimed: dict[tuple[str, int], float] = {}
    for role in WORKER_ROLES:
        sections: list[WorkerConfig] = [getattr(own, role) for own in config.each().values()]
        replicas = itertools.chain.from_iterable([section] * section.replicas for section in sections)
        claimed |= {(role, index): part.num_cpus for index, part in enumerate(replicas) if part.num_gpus == 0}
    workers = list(claimed)
    if not config.ray.pin_cores or len(cores) < max(CORES_TO_SHARE_OUT, len(workers)) or not workers:
        return {}
    weights = [max(num_cpus, 1.0) for num_cpus in claimed.values()]
    shares, taken, weight = {}, 0, 0.0
    for number, worker in enumerate(workers, start=1):
        weight += weights[number - 1]
        end = round(len(cores) * weight / sum(weights))
        # At least one core each, and one left for each that follows.
        end = min(max(end, taken + 1), len(cores) - (len(workers) - number))
        shares[worker] = tuple(cores[taken:end])
        taken = end
    return shares
