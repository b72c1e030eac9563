"""OpenTelemetry behind `branchline.observe.tracing`: spans leave in batches, on a thread of the SDK's.

Ending a span puts it into a bounded queue; when the collector is slow or gone, the oldest are dropped. So tracing never
makes a request wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from branchline.config_observe import TracingConfig
from branchline.observe.metrics import version
from branchline.observe.tracing import Metadata, Value

#: Seconds that one export may take, that spans wait for others at most, and that the last export may take in all.
EXPORT_TIMEOUT_S = 5.0
BATCH_S = 1.0
CLOSE_S = 3.0
#: Spans that wait to be sent.
QUEUE = 4096

_PROPAGATOR = TraceContextTextMapPropagator()


class OtelSpan:
    def __init__(self, span: trace.Span) -> None:
        self._span = span
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
        self.metadata: Metadata = tuple(carrier.items())

    def set(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        self._span.add_event(name, attributes)


class OtelTracer:
    """Of one process; `close` it. The SDK's global provider stays as it is."""

    def __init__(self, config: TracingConfig, role: str, instance: str) -> None:
        resource = Resource.create(
            {"service.name": f"branchline-{role}", "service.version": version(), "service.instance.id": instance}
        )
        self._exporter = OTLPSpanExporter(
            endpoint=config.endpoint,
            insecure=config.endpoint.startswith("http://"),
            timeout=EXPORT_TIMEOUT_S,
        )
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=QUEUE,
            schedule_delay_millis=BATCH_S * 1000,
            max_export_batch_size=512,
        )
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)), resource=resource, shutdown_on_exit=False
        )
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("branchline", version())

    @contextlib.contextmanager
    def span(
        self, name: str, parent: Metadata, attributes: Mapping[str, Value] | None = None, *, serves: bool = True
    ) -> Iterator[OtelSpan]:
        span = self._tracer.start_span(
            name,
            context=_PROPAGATOR.extract(dict(parent)),
            kind=trace.SpanKind.SERVER if serves else trace.SpanKind.CLIENT,
            attributes=attributes,
        )
        try:
            yield OtelSpan(span)
        except (asyncio.CancelledError, GeneratorExit):  # nobody wants it any more: no error of anybody's
            span.set_attribute("branchline.cancelled", True)
            raise
        except Exception as error:
            # Without the message, which may quote a request.
            span.set_attribute("error.type", str(getattr(getattr(error, "code", None), "name", type(error).__name__)))
            span.set_status(trace.StatusCode.ERROR)
            raise
        finally:
            span.end()

    async def close(self) -> None:
        """Sends what is left, for `CLOSE_S` seconds at most. No spans may begin any more."""
        # On a daemon thread: one that hangs must not keep the process from ending.
        closing = threading.Thread(target=self._processor.shutdown, name="spans-close", daemon=True)
        closing.start()
        until = time.monotonic() + CLOSE_S
        while closing.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if closing.is_alive():
            self._exporter.shutdown()  # ends its waiting for the collector
