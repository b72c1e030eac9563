"""A collector of spans: the real OTLP service, which keeps what comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.endpoint = ""
        #: With the name of the service that each came from.
        self.spans: list[tuple[str, Span]] = []

    def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[tuple[str, Span]]:
        return [(service, span) for service, span in list(self.spans) if span.trace_id.hex() == trace_id]

    def wait_for(self, trace_id: str, count: int, timeout_s: float = 20.0) -> dict[str, tuple[str, Span]]:
        """A trace's spans by their names, once there are so many."""
        until = time.monotonic() + timeout_s
        while len(spans := self.of(trace_id)) < count:
            assert time.monotonic() < until, f"{[span.name for _, span in spans]} after {timeout_s:g} s"
            time.sleep(0.05)
        assert len(spans) == count, [span.name for _, span in spans]
        return {span.name: (service, span) for service, span in spans}


def attributes(holder: Any) -> dict[str, Any]:
    """Of a span or an event, by name."""
    found = {}
    for attribute in holder.attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        found[attribute.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """On a free port of loopback."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(1).wait(5)
