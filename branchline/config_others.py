"""More models beside the main one (`others`): what may differ, and what they take over."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from branchline.config_base import ConfigError, require

#: What is a model's own; everything else belongs to the system.
SECTIONS = ("model", "engine", "prefill", "decode", "transfer")
GATEWAY_FIELDS = ("prefill_workers", "decode_workers", "tool_parser", "reasoning_parser")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")


def check_others(others: Mapping[str, Any], main: str) -> None:
    """Raises ConfigError, naming the field. `main`: the name that the main model is served by, if it has one."""
    for name, differences in others.items():
        where = f"others.{name}"
        require(
            isinstance(name, str) and _NAME.fullmatch(name) is not None,
            f"{where}: a model's name has letters, digits and . _ / : -, 128 at most",
        )
        require(name != main, f"{where}: the main model has that name (gateway.served_model_name)")
        require(isinstance(differences, Mapping), f"{where}: must be a mapping of sections")
        for section, values in differences.items():
            known = section in SECTIONS or section == "gateway"
            require(known, f"{where}.{section}: can't differ; what can is in {', '.join(SECTIONS)}")
            require(isinstance(values, Mapping), f"{where}.{section}: must be a mapping")
            for key in values if section == "gateway" else ():
                if key not in GATEWAY_FIELDS:
                    raise ConfigError(f"{where}.gateway.{key}: can't differ; what can is {', '.join(GATEWAY_FIELDS)}")


def laid_over(main: Mapping[str, Any], differences: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tree of another model's configuration. It takes over the main model's but for what belongs to that alone: the
    names, the addresses of its workers, how its text is read; and fixed ports, in whose place come free ones unless a
    custom resource gives each worker a node of its own.
    """
    tree = {section: dict(values) for section, values in main.items()}
    for role, port in itertools.product(("prefill", "decode"), ("port", "metrics_port")):
        if not tree[role]["resource"]:
            tree[role][port] = min(tree[role][port], 0)  # -1, none, stays
    tree["gateway"] |= {"prefill_workers": [], "decode_workers": [], "tool_parser": "", "reasoning_parser": ""}
    for section, values in differences.items():
        tree[section] |= values
    tree["gateway"]["served_model_name"] = name
    return tree
