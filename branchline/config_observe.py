"""The sections `tracing` and `logging` of the configuration: what a system tells of itself beside its metrics."""

from __future__ import annotations

from dataclasses import dataclass

from branchline.config_base import require, require_choice

LOG_FORMATS = ("text", "json")


@dataclass(frozen=True)
class TracingConfig:
    """OpenTelemetry spans of requests, over OTLP's gRPC."""

    #: The collector, `http://HOST:PORT` or `https://HOST:PORT`. Empty: there are no spans, and nothing of OpenTelemetry
    #: is imported; a trace context that a client sends goes on to the workers all the same.
    endpoint: str = ""
    #: The share of traces kept of those that begin here, 0 to 1. Where the client's trace goes on, it has decided.
    sample_ratio: float = 1.0

    def __post_init__(self) -> None:
        require(
            not self.endpoint or self.endpoint.startswith(("http://", "https://")),
            f"tracing.endpoint: must be http://HOST:PORT or https://HOST:PORT, got {self.endpoint!r}",
        )
        require(
            0 <= self.sample_ratio <= 1, f"tracing.sample_ratio: must be between 0 and 1, got {self.sample_ratio:g}"
        )


@dataclass(frozen=True)
class LoggingConfig:
    """What processes write to standard error."""

    #: `text`, or `json`: an object a line, for machines.
    format: str = "text"

    def __post_init__(self) -> None:
        require_choice("logging.format", self.format, LOG_FORMATS)


def require_metrics_port(name: str, port: int) -> None:
    """Raises ConfigError for what is neither a port nor -1, which is none."""
    require(-1 <= port <= 65535, f"{name}: must be between -1 and 65535, got {port}")
