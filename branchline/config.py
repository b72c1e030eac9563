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

from branchline.config_base import ConfigError
from branchline.config_base import require as _require
from branchline.config_cluster import ControlConfig, RayConfig
from branchline.config_model import CORES_TO_SHARE_OUT, DEVICES, DTYPES, PROVIDERS, EngineConfig, ModelConfig
from branchline.config_observe import LoggingConfig, TracingConfig
from branchline.config_others import check_others, laid_over
from branchline.config_roles import ROUTINGS, GatewayConfig, TransferConfig, WorkerConfig
from branchline.config_security import SecurityConfig

__all__ = [
    "CORES_TO_SHARE_OUT",
    "DEVICES",
    "DTYPES",
    "PROVIDERS",
    "ROUTINGS",
    "Config",
    "ConfigError",
    "ControlConfig",
    "EngineConfig",
    "GatewayConfig",
    "LoggingConfig",
    "ModelConfig",
    "RayConfig",
    "SecurityConfig",
    "TracingConfig",
    "TransferConfig",
    "WorkerConfig",
    "build",
    "from_mapping",
    "load",
    "to_mapping",
]

_ITEMS = {str: "strings", int: "whole numbers", float: "numbers"}


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
    #: More models that the same gateways serve, each with workers of its own: by the name that requests give, what
    #: differs from the sections above.
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            not self.engine.compile or self.model.provider == "vllm",
            f"engine.compile: the provider must be vllm, model.provider is {self.model.provider}",
        )
        check_others(self.others, self.gateway.served_model_name)
        self.each()  # whose values are checked, too

    def each(self) -> dict[str, Config]:
        """The configuration of each model: "" is the main one, the others have their names."""
        own = dataclasses.replace(self, others={}) if self.others else self
        found = {"": own}
        for name, differences in self.others.items():
            try:
                found[name] = from_mapping(laid_over(to_mapping(own), differences, name))
            except ConfigError as error:
                raise ConfigError(f"others.{name}.{error}") from None
        return found

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
    tree: dict[str, Any] = dataclasses.asdict(config)
    others = tree.pop("others")
    sections = {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in part.items()}
        for section, part in tree.items()
    }
    return {**sections, "others": others}


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
    if typing.get_origin(hint) is Mapping:
        _require(isinstance(value, Mapping), f"{where}: must be a mapping, got {type(value).__name__}")
        return value
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
