"""What the processes of a role get: `prefill` and `decode` workers, the transfer between them, `gateway`."""

from __future__ import annotations

from dataclasses import dataclass

from branchline.config_base import require as _require
from branchline.config_base import require_choice as _choice
from branchline.config_cluster import require_claims
from branchline.config_observe import require_metrics_port

ROUTINGS = ("least_load", "power_of_two", "prefix_affinity", "session_affinity")


@dataclass(frozen=True)
class WorkerConfig:
    """One role of worker: how many, what each may use, where it listens."""

    replicas: int = 1
    host: str = "127.0.0.1"
    #: 0 takes a free port.
    port: int = 0
    #: Where `/metrics` is served for Prometheus: 0 takes a free port, -1 none.
    metrics_port: int = -1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    #: Memory that Ray keeps for each on its node, in MiB, as it does with CPUs; 0 claims none.
    memory_mib: int = 0
    #: Ray's label selectors, `key=value` each, all of which a node's labels must meet: `zone=a`, `zone=!a`,
    #: `ray.io/accelerator-type=in(A100,H100)`.
    labels: tuple[str, ...] = ()
    #: A custom resource of Ray, of which each worker claims one: it goes to a node that offers it. Such nodes offer
    #: one for each worker that they are meant to have; a fixed port is then the same for all and doesn't count up.
    resource: str = ""
    #: Seconds that an unused lease keeps its blocks (decode), or that a hand-off may stall (prefill).
    lease_ttl_s: float = 10.0

    def __post_init__(self) -> None:
        _require(self.replicas >= 1, f"replicas: must be at least 1, got {self.replicas}")
        _require(0 <= self.port <= 65535, f"port: must be between 0 and 65535, got {self.port}")
        require_metrics_port("metrics_port", self.metrics_port)
        _require(self.num_cpus >= 0, f"num_cpus: must not be negative, got {self.num_cpus}")
        _require(self.num_gpus >= 0, f"num_gpus: must not be negative, got {self.num_gpus}")
        require_claims("", self.memory_mib, self.labels)
        _require(self.lease_ttl_s > 0, f"lease_ttl_s: must be positive, got {self.lease_ttl_s}")


@dataclass(frozen=True)
class TransferConfig:
    """How KV goes from prefill to decode workers."""

    #: Connections that one hand-off may use at once.
    streams: int = 1

    def __post_init__(self) -> None:
        _require(1 <= self.streams <= 8, f"transfer.streams: must be between 1 and 8, got {self.streams}")


@dataclass(frozen=True)
class GatewayConfig:
    """The front door. The worker addresses are filled in by the launcher, or by hand without Ray."""

    replicas: int = 1
    host: str = "127.0.0.1"
    grpc_port: int = 0
    #: Where OpenAI's HTTP API is served: 0 takes a free port, -1 none.
    http_port: int = -1
    #: Where `/metrics` is served for Prometheus beside the HTTP API, which has it too: 0 takes a free port, -1 none.
    metrics_port: int = -1
    #: The model's name over HTTP; empty for the one that it has anyway.
    served_model_name: str = ""
    #: vLLM's names of the parsers that read tool calls and reasoning out of a chat's text; empty for none.
    tool_parser: str = ""
    reasoning_parser: str = ""
    num_cpus: float = 1.0
    #: As for workers, these three.
    memory_mib: int = 0
    labels: tuple[str, ...] = ()
    resource: str = ""
    prefill_workers: tuple[str, ...] = ()
    decode_workers: tuple[str, ...] = ()
    #: To which workers a request goes: `least_load`, `power_of_two` (the better one of two drawn at random),
    #: `prefix_affinity` (those that have the beginning of its context, unless they are too busy for that to pay), or
    #: `session_affinity` (always the same ones for a session).
    routing: str = "prefix_affinity"
    #: KV blocks that `prefix_affinity` remembers of a worker at most, about 150 bytes each; fewer where it has fewer.
    routing_blocks: int = 65536
    #: Deadline of a request that brings none.
    request_timeout_s: float = 600.0
    #: Seconds without a token after which a worker counts as hung and the request moves on.
    stall_timeout_s: float = 30.0
    #: Seconds that a request waits for a worker to come back when there is none of a role.
    worker_wait_s: float = 60.0
    #: Times that a request is started in all, the first included.
    max_attempts: int = 4
    #: Requests in the house at once; more are refused.
    max_requests: int = 256
    #: Calls over gRPC, open HTTP connections, and HTTP requests that are read or answered, at once; more are refused.
    max_grpc_calls: int = 1024
    max_http_connections: int = 1024
    max_http_requests: int = 512
    #: Largest max_tokens, and the default where the context leaves more.
    max_tokens_limit: int = 4096

    def __post_init__(self) -> None:
        _require(0 <= self.grpc_port <= 65535, f"gateway.grpc_port: must be between 0 and 65535, got {self.grpc_port}")
        _require(
            -1 <= self.http_port <= 65535, f"gateway.http_port: must be between -1 and 65535, got {self.http_port}"
        )
        require_metrics_port("gateway.metrics_port", self.metrics_port)
        _choice("gateway.routing", self.routing, ROUTINGS)
        counts = ("replicas", "routing_blocks", "max_attempts", "max_requests", "max_tokens_limit")
        for name in (*counts, "max_grpc_calls", "max_http_connections", "max_http_requests"):
            _require(getattr(self, name) >= 1, f"gateway.{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("request_timeout_s", "stall_timeout_s", "worker_wait_s"):
            _require(getattr(self, name) > 0, f"gateway.{name}: must be positive, got {getattr(self, name)}")
        require_claims("gateway.", self.memory_mib, self.labels)
