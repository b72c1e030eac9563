"""Registries, trace contexts, spans that nobody collects, log formats: each by itself."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import time
from typing import Any

import pytest
from prometheus_client import generate_latest

import decode_worker.metrics
import gateway.metrics
import prefill_worker.metrics
from branchline.config import ConfigError, from_mapping
from branchline.config_observe import LoggingConfig, TracingConfig
from branchline.observe.exposition import exposed
from branchline.observe.logs import about, handler
from branchline.observe.metrics import Family, StateCollector, histogram, registry_of
from branchline.observe.otel import CLOSE_S, EXPORT_TIMEOUT_S
from branchline.observe.tracing import NoTracer, trace_context, tracing
from branchline.wire.server import PortInUseError

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_names_are_prometheus_s() -> None:
    """What promtool would say, for all of them."""
    families = [
        *gateway.metrics.FAMILIES,
        *gateway.metrics.HISTOGRAMS,
        *prefill_worker.metrics.FAMILIES,
        prefill_worker.metrics.SECONDS,
        *decode_worker.metrics.FAMILIES,
    ]
    assert len({family.name for family in families}) == len(families)
    for family in families:
        role = family.name.split("_")[1]
        assert family.name.startswith("branchline_"), family.name
        assert role in ("gateway", "prefill", "decode"), family.name
        assert family.help.endswith("."), family.name
        assert not family.name.removesuffix("_total").endswith(("_ms", "_kib", "_count", "_sum", "_bucket")), (
            family.name
        )


def test_a_registry_reads_when_it_is_scraped() -> None:
    state = {"a": 1}
    count, took = Family("x_things_total", "counter", "Things.", ("kind",)), Family("x_seconds", "histogram", "Time.")
    lengths = Family("x_length", "histogram", "Lengths.")
    seconds = histogram(took, (0.1, 1.0))

    def read(sheet: Any) -> None:
        sheet.put_each(count, state)
        sheet.put_histogram(lengths, [2, 0, 1], 5)

    registry = registry_of("test", StateCollector((count, lengths), read, {took: seconds}))
    state["b"] = 7
    seconds.observe(0.5)
    page = generate_latest(registry).decode()
    assert 'x_things_total{kind="b"} 7.0' in page
    assert [line for line in page.splitlines() if line.startswith("x_length")] == [
        'x_length_bucket{le="1.0"} 2.0',
        'x_length_bucket{le="2.0"} 2.0',
        'x_length_bucket{le="3.0"} 3.0',
        'x_length_bucket{le="+Inf"} 3.0',
        "x_length_count 3.0",
        "x_length_sum 5.0",
    ]
    assert 'x_seconds_bucket{le="1.0"} 1.0' in page
    assert "_created" not in page
    assert 'branchline_build_info{role="test"' in page


async def test_a_port_is_free_again_behind_its_block() -> None:
    told: list[str] = []
    before = asyncio.all_tasks()
    async with exposed(registry_of("test"), "127.0.0.1", 0, told.append):
        port = int(told[0].removesuffix("/metrics").rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.readline(), 5)
        with pytest.raises(PortInUseError):
            async with exposed(registry_of("test"), "127.0.0.1", port, told.append):
                pass
    writer.close()
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncio.open_connection("127.0.0.1", port)
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"traceparent": PARENT, "other": "x"}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a=1"}, {"traceparent": PARENT, "tracestate": "a=1"}),
        ({"traceparent": PARENT, "tracestate": "ü"}, {"traceparent": PARENT}),
        ({"traceparent": PARENT.upper()}, {}),
        ({"traceparent": f"{PARENT}\n"}, {}),
        ({"traceparent": PARENT.encode()}, {}),
        ({"traceparent": "ff" + PARENT[2:]}, {}),
        ({"tracestate": "a=1"}, {}),
    ],
)
def test_only_a_sound_trace_context_goes_on(headers: dict[str, Any], found: dict[str, str]) -> None:
    assert dict(trace_context(headers.items())) == found
    with NoTracer().span("x", trace_context(headers.items())) as span:
        assert dict(span.metadata) == found


async def test_a_collector_that_hangs_costs_no_request_and_little_at_the_end() -> None:
    """It takes connections and says nothing. More spans than the queue holds are dropped."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = TracingConfig(endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}")
        longest = 0.0
        async with tracing(config, "test", "i") as tracer:
            for number in range(6000):
                began = time.perf_counter()
                with tracer.span("x", (("traceparent", PARENT),), {"n": number}) as span:
                    span.event("e")
                longest = max(longest, time.perf_counter() - began)
            assert dict(span.metadata)["traceparent"].split("-")[1] == PARENT.split("-")[1]
            ended = time.monotonic()
        # Far above what a busy machine adds, below what waiting for an export would.
        assert longest < EXPORT_TIMEOUT_S / 2
        assert time.monotonic() - ended < CLOSE_S + EXPORT_TIMEOUT_S


def _line(config: LoggingConfig, log: Any) -> str:
    made = handler(config, "decode")
    assert isinstance(made, logging.StreamHandler)
    made.setStream(io.StringIO())
    logger = logging.Logger("some.module")
    logger.addHandler(made)
    log(logger)
    return made.stream.getvalue().rstrip("\n")


def test_records_as_objects() -> None:
    def fail(logger: logging.Logger) -> None:
        try:
            raise ValueError("why")
        except ValueError:
            logger.exception("two\nlines %d", 5, extra=about("r1"))

    line = _line(LoggingConfig("json"), fail)
    assert "\n" not in line
    record = json.loads(line)
    assert record["exception"].endswith("ValueError: why")
    assert {key: record[key] for key in ("level", "logger", "role", "message", "request_id")} == {
        "level": "error",
        "logger": "some.module",
        "role": "decode",
        "message": "two\nlines 5",
        "request_id": "r1",
    }
    assert record["time"].endswith("Z")
    assert "request_id" not in json.loads(_line(LoggingConfig("json"), lambda logger: logger.warning("x")))


def test_records_as_text() -> None:
    assert _line(LoggingConfig(), lambda logger: logger.info("x", extra=about("r1"))).endswith(" x request=r1")
    assert _line(LoggingConfig(), lambda logger: logger.info("x")).endswith(" INFO some.module x")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("tracing", "endpoint", "collector:4317"),
        ("tracing", "sample_ratio", 1.5),
        ("logging", "format", "xml"),
        ("gateway", "metrics_port", -2),
        ("decode", "metrics_port", 65536),
    ],
)
def test_a_wrong_configuration_is_named(section: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{section}\.{field}: "):
        from_mapping({section: {field: value}})
