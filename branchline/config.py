"""The one configuration object: frozen dataclasses, read from YAML, overridden by flags.

Every process gets the whole object and reads its part. Messages name the field by its full path
(`decode.port: …`), so that a typo is found where it was made.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchline.config_base import ConfigError as ConfigError
from branchline.config_base import require as _require
from branchline.config_base import require_choice as _choice
from branchline.config_cluster import ControlConfig, RayConfig, require_claims
from branchline.config_observe import LoggingConfig, TracingConfig, require_metrics_port
from branchline.config_security import SecurityConfig

DTYPES = ("bfloat16", "float16", "float32")
PROVIDERS = ("vllm", "reference")
#: Below this many cores the workers of one machine share them all; from here on each gets its own.
CORES_TO_SHARE_OUT = 4
DEVICES = ("auto", "cpu", "cuda")
ROUTINGS = ("least_load", "power_of_two", "prefix_affinity", "session_affinity")
_ITEMS = {str: "strings", int: "whole numbers", float: "numbers"}


@dataclass(frozen=True)
class ModelConfig:
    """What is served. `model` and `draft` take a directory, a Hugging Face id, or `default`; `draft` also `none`."""

    model: str = "default"
    draft: str = "default"
    dtype: str = "bfloat16"
    provider: str = "vllm"
    device: str = "auto"
    #: `none`, `chain:K`, `static:FILE`, `dynamic:DEPTH,TOPK,NODES`, an inline list of choices, or `default` for the
    #: shipped tree.
    tree: str = "default"

    def __post_init__(self) -> None:
        _require(bool(self.model), "model.model: must not be empty")
        _require(bool(self.draft), "model.draft: must not be empty")
        _choice("model.dtype", self.dtype, DTYPES)
        _choice("model.provider", self.provider, PROVIDERS)
        _choice("model.device", self.device, DEVICES)


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine, the same for prefill and decode workers."""

    #: Tokens in a KV block.
    block_size: int = 16
    #: Memory for the paged KV cache (target and draft) in MiB.
    kv_cache_mib: int = 1024
    #: The longest sequence in tokens; 0 takes the model's limit.
    max_model_len: int = 0
    #: Requests that decode together.
    max_batch: int = 8
    #: Sizes to which a batch is padded, each with its own CUDA graphs; those above `max_batch` are left out.
    batch_buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    #: Draft fewer nodes while that brings more tokens a second, as it does where many requests run: measured while
    #: serving. False drafts the whole tree for everybody.
    adaptive_tree: bool = True
    #: Tokens that one prefill step computes.
    prefill_chunk_tokens: int = 512
    #: Keep the KV of prompts, and on decode workers of answers, for later prompts that begin alike, in blocks that
    #: nothing else needs.
    prefix_caching: bool = True
    #: Compute threads of a worker; 0 chooses by role and cores, see `threads_for`.
    threads: int = 0
    #: Compile the model with vLLM's compiler: faster steps for a start that takes a minute or two longer. Needs the
    #: `vllm` provider and a C++ compiler on every node.
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "kv_cache_mib", "max_batch", "prefill_chunk_tokens"):
            _require(getattr(self, name) >= 1, f"engine.{name}: must be at least 1, got {getattr(self, name)}")
        _require(
            all(size >= 1 for size in self.batch_buckets),
            f"engine.batch_buckets: must be positive, got {list(self.batch_buckets)}",
        )
        for name in ("max_model_len", "threads"):
            _require(getattr(self, name) >= 0, f"engine.{name}: must not be negative, got {getattr(self, name)}")

    def threads_for(self, role: str, cores: int, shared: bool) -> int:
        """Compute threads of a `prefill`, `decode` or `gateway` process on `cores` cores, shared with others or not.

        On shared cores waiting threads must sleep, and then waking one costs a decode step more than a second
        core gains it; a prompt's larger products do gain (docs/architecture.md, section 9).
        """
        if role == "gateway":
            return 1
        return self.threads or (1 if role == "decode" and shared else max(1, cores))


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


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    prefill: WorkerConfig = field(default_factory=WorkerConfig)
    decode: WorkerConfig = field(default_factory=WorkerConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        _require(
            not self.engine.compile or self.model.provider == "vllm",
            f"engine.compile: the provider must be vllm, model.provider is {self.model.provider}",
        )

    def override(self, **flags: Any) -> Config:
        """A copy with flags laid over: `override(**{"model.dtype": "float32"})`. A flag of None is skipped."""
        tree: dict[str, Any] = to_mapping(self)
        for path, value in flags.items():
            if value is None:
                continue
            *sections, name = path.split(".")
            part = tree
            for section in sections:
                part = part.setdefault(section, {})  # one that does not exist is refused below
                _require(isinstance(part, dict), f"{path}: unknown field")
            part[name] = value
        return from_mapping(tree)


def load(path: str | Path) -> Config:
    """Reads a YAML file. Raises ConfigError for a missing file, bad YAML, an unknown or wrong field."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return from_mapping(tree or {})


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """Builds a Config from nested mappings, checking names, types and values."""
    built: Config = build(Config, tree)
    return built


def to_mapping(config: Config) -> dict[str, Any]:
    """The inverse of `from_mapping`: plain dicts and lists, fit for YAML."""
    return {
        section.name: {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(getattr(config, section.name)).items()
        }
        for section in dataclasses.fields(config)
    }


def build(cls: type, tree: Any, path: str = "") -> Any:
    """A frozen dataclass from nested mappings. Raises ConfigError with a field's full path, which starts with `path`,
    for an unknown field or a value of the wrong type; the class itself may raise it for a wrong value."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path or 'configuration'}: must be a mapping, got {type(tree).__name__}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(f"{where}: unknown field; known are {', '.join(known)}")
        values[key] = _convert(hints[key], value, where)
    try:
        return cls(**values)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if not path or message.startswith(path) else f"{path}.{message}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if isinstance(hint, types.GenericAlias):
        item_type = typing.get_args(hint)[0]
        allowed = (int, float) if item_type is float else (item_type,)
        if not isinstance(value, (list, tuple)) or not all(type(item) in allowed for item in value):
            raise ConfigError(f"{where}: must be a list of {_ITEMS[item_type]}")
        return tuple(item_type(item) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: must be of type {hint.__name__}, got {value!r}")
    return value
