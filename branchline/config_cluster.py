"""Where processes run and when they count as hung (`ray`), who may steer them (`control`), what roles claim."""

from __future__ import annotations

import re
from dataclasses import dataclass

from branchline.config_base import require, require_choice

PLACEMENTS = ("none", "spread", "pack")
#: `key=value`; Ray itself knows which values there are.
_LABEL = re.compile(r"[^=\s]+=[^=]+")


@dataclass(frozen=True)
class RayConfig:
    """`address` empty starts a local Ray; `auto` or HOST:PORT joins one."""

    address: str = ""
    start_timeout_s: float = 300.0
    #: Seconds without an answer after which a process that has answered before counts as hung and is replaced.
    hung_after_s: float = 30.0
    #: Placement groups for the first workers: `spread` puts decode workers on different nodes as far as there are
    #: enough, `pack` each pair of a prefill and a decode worker on one node, `none` leaves it to Ray.
    placement: str = "none"
    #: Give each CPU worker cores of its own on its node, as many as it claims, while there are enough. Two systems on
    #: the same nodes don't know of each other's cores: turn it off there.
    pin_cores: bool = True
    #: The system outlives the process, or the job, that starts it, which ends as soon as requests can be answered.
    #: `branchline stop` ends it. Needs a Ray that is running already.
    detached: bool = False

    def __post_init__(self) -> None:
        for name in ("start_timeout_s", "hung_after_s"):
            require(getattr(self, name) > 0, f"ray.{name}: must be positive, got {getattr(self, name):g}")
        require_choice("ray.placement", self.placement, PLACEMENTS)


@dataclass(frozen=True)
class ControlConfig:
    """Where the launcher takes the commands `branchline status | scale | drain | stop`."""

    #: On the loopback interface in plain text, for whoever is logged in there; elsewhere with `security.inside`.
    host: str = "127.0.0.1"
    #: 0 takes a free port, which the launcher tells; -1 none.
    port: int = 0

    def __post_init__(self) -> None:
        require(-1 <= self.port <= 65535, f"control.port: must be between -1 and 65535, got {self.port}")


def require_claims(prefix: str, memory_mib: int, labels: tuple[str, ...]) -> None:
    """Raises ConfigError, naming the field with `prefix` before it."""
    require(memory_mib >= 0, f"{prefix}memory_mib: must not be negative, got {memory_mib}")
    for label in labels:
        require(bool(_LABEL.fullmatch(label)), f"{prefix}labels: must be key=value each, got {label!r}")
    keys = [label.partition("=")[0] for label in labels]
    require(len(set(keys)) == len(keys), f"{prefix}labels: a key is named twice, got {list(labels)}")
