"""What every section of the configuration needs to check itself."""

from __future__ import annotations


class ConfigError(ValueError):
    """A wrong configuration; the message names the field."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless the value is one of them."""
    require(value in choices, f"{name}: must be one of {', '.join(choices)}, got {value!r}")
