"""Spans, as far as the rest of the program knows them: an interface, and what is used when nobody collects any.

A span's parent comes as the headers or metadata of a call, and goes on as the metadata of other calls: W3C trace
context. OpenTelemetry itself is behind `branchline.observe.otel`, imported only where a collector is configured.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from branchline.config_observe import TracingConfig

Value = str | bool | int | float | Sequence[str]
#: A call's metadata: names in lower case.
Metadata = tuple[tuple[str, str], ...]

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{1,64})?")
_TRACESTATE = re.compile(r"[ -~]{1,512}")


class Span(Protocol):
    """Something that takes time. Attributes say nothing of what is in prompts and answers."""

    @property
    def metadata(self) -> Metadata:
        """For calls that are made on its behalf."""
        ...

    def set(self, attributes: Mapping[str, Value]) -> None: ...

    def event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        """It happens now."""
        ...


class Tracer(Protocol):
    def span(
        self, name: str, parent: Metadata, attributes: Mapping[str, Value] | None = None, *, serves: bool = True
    ) -> AbstractContextManager[Span]:
        """Begins now and ends with the block. `parent` is what `trace_context` found; `serves`: it answers a call from
        another process, rather than making one. An exception that leaves the block marks the span as failed, by the
        exception's name alone; a cancellation, as cancelled.
        """
        ...


class _PassedOn:
    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata

    def set(self, attributes: Mapping[str, Value]) -> None:
        pass

    def event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        pass


class NoTracer:
    """No spans; the parent's context goes on to whoever is called."""

    @contextlib.contextmanager
    def span(
        self,
        name: str,  # noqa: ARG002 - the interface's
        parent: Metadata,
        attributes: Mapping[str, Value] | None = None,  # noqa: ARG002
        *,
        serves: bool = True,  # noqa: ARG002
    ) -> Iterator[Span]:
        yield _PassedOn(parent)


def trace_context(headers: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """The trace context in a call's headers or metadata, names in lower case; none when it is missing or malformed."""
    found = {name: value for name, value in headers if name in ("traceparent", "tracestate")}
    parent, state = found.get("traceparent"), found.get("tracestate")
    if not isinstance(parent, str) or _TRACEPARENT.fullmatch(parent) is None:
        return ()
    if not isinstance(state, str) or _TRACESTATE.fullmatch(state) is None:
        return (("traceparent", parent),)
    return (("traceparent", parent), ("tracestate", state))


@contextlib.asynccontextmanager
async def tracing(config: TracingConfig, role: str, instance: str) -> AsyncGenerator[Tracer]:
    """The tracer of a process; what it has not sent at the end of the block, it sends within a few seconds or drops."""
    if not config.endpoint:
        yield NoTracer()
        return
    from branchline.observe.otel import OtelTracer

    tracer = OtelTracer(config, role, instance)
    try:
        yield tracer
    finally:
        await tracer.close()
