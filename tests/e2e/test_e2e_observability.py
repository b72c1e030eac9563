"""A running system under a real Prometheus, a real OTLP collector, and somebody who reads its logs."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import Fleet, running_fleet, wait_until
from e2e_model import TinyModel
from observability_docs import documented
from prometheus_client.parser import text_string_to_metric_families
from trace_collector import Collector, attributes, collecting

from branchline.client import InvalidRequestError

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

PROMPT = "a bad cab backed and decked " * 4
TOKENS = 24
HTTP_PROMPT = "fed a lamb"
#: A client's trace, and its span.
TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CLIENT_SPAN}-01"
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Watched:
    """A system that has answered a few requests. `targets`: HOST:PORT of all pages, the gateway's HTTP port last."""

    fleet: Fleet
    collector: Collector
    targets: list[str]
    logs: dict[str, str]


def fetch(url: str, **query: str) -> str:
    address = f"{url}?{urllib.parse.urlencode(query)}" if query else url
    with NO_PROXY.open(address, timeout=10) as response:
        return response.read().decode()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def watched(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    ports = dict(zip(("gateway", "prefill", "decode"), free_ports(3), strict=True))
    with collecting() as collector:
        config = tiny.config(
            **{f"{role}.metrics_port": port for role, port in ports.items()},
            **{"gateway.http_port": 0, "tracing.endpoint": collector.endpoint, "logging.format": "json"},
        )
        with running_fleet(config, tmp_path_factory.mktemp("watched")) as fleet:
            targets = [f"127.0.0.1:{port}" for port in ports.values()] + [fleet.http]
            _work(fleet)
            logs = {role: process.log.read_text() for role, process in fleet.by_role.items()}
            yield Watched(fleet, collector, targets, logs)


def _work(fleet: Fleet) -> None:
    """Two prompts that are one, a chat, a call over HTTP and one that is refused."""
    options: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True}
    fleet.client.complete(**options)
    done = fleet.client.complete(**options, traceparent=TRACEPARENT)
    assert done.usage.cached_tokens > 0
    assert done.speculation.accepted > 0
    body = {"model": fleet.client.models()[0].id, "prompt": HTTP_PROMPT, "max_tokens": TOKENS, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://{fleet.http}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    NO_PROXY.open(request, timeout=30).close()
    with pytest.raises(InvalidRequestError):
        fleet.client.complete(prompt="a" * 5000, max_tokens=1)


def test_the_pages_show_what_is_documented(watched: Watched) -> None:
    """Every metric with its type and labels, and no other."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for target in watched.targets[:3]:
        for family in text_string_to_metric_families(fetch(f"http://{target}/metrics")):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = frozenset(label for sample in family.samples for label in sample.labels if label != "le")
            assert family.samples, name
            assert family.documentation, name
            found[name] = (family.type, labels)
    assert found == documented()


def test_both_pages_of_the_gateway_are_one(watched: Watched) -> None:
    own, beside = (fetch(f"http://{watched.targets[at]}/metrics") for at in (0, 3))
    drop = ("process_", "branchline_gateway_requests_running")
    assert [line for line in own.splitlines() if not line.startswith(drop)] == [
        line for line in beside.splitlines() if not line.startswith(drop)
    ]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing (docs/development.md, Prometheus)")
def test_promtool_has_no_complaints(watched: Watched) -> None:
    for target in watched.targets:
        page = fetch(f"http://{target}/metrics")
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=30, check=False
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, ""), target


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is missing (docs/development.md, Prometheus)"
)
def test_prometheus_scrapes_every_documented_metric(watched: Watched, tmp_path: Path) -> None:
    scrape = {"job_name": "branchline", "static_configs": [{"targets": watched.targets}]}
    (tmp_path / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]})
    )
    port = free_ports(1)[0]
    api = f"http://127.0.0.1:{port}/api/v1"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )

    def query(text: str) -> list[Any]:
        return json.loads(fetch(f"{api}/query", query=text))["data"]["result"]

    def all_up() -> bool:
        try:
            return len(query("up == 1")) == len(watched.targets)
        except OSError:
            assert process.poll() is None, (tmp_path / "log").read_text()
            return False

    try:
        wait_until(all_up, 60, "Prometheus has scraped everything")
        missing = [
            name
            for name, (kind, _) in documented().items()
            if not query(f"{name}_count" if kind == "histogram" else name)
        ]
        assert not missing
        generated = (
            f'sum by (instance) (branchline_gateway_tokens_total{{kind="generated",instance="{watched.targets[0]}"}})'
        )
        assert [one["value"][1] for one in query(generated)] == [str(3 * TOKENS)]
        used = query('branchline_decode_kv_blocks{state="used"} + branchline_prefill_kv_blocks{state="used"}')
        assert all(one["value"][1] == "0" for one in used)
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_a_trace_is_complete_from_the_client_to_the_last_token(watched: Watched) -> None:
    spans = watched.collector.wait_for(TRACE, 5)
    parents = {name: span.parent_span_id.hex() for name, (_, span) in spans.items()}
    ids = {name: span.span_id.hex() for name, (_, span) in spans.items()}
    root = "text_completion"
    assert parents == {
        root: CLIENT_SPAN,
        "prefill": ids[root],
        "hand-off": ids["prefill"],
        "hand-off receive": ids["hand-off"],
        "decode": ids[root],
    }
    services = {name: service.removeprefix("branchline-") for name, (service, _) in spans.items()}
    assert services == {
        root: "gateway",
        "prefill": "prefill",
        "hand-off": "prefill",
        "hand-off receive": "decode",
        "decode": "decode",
    }
    assert not any(span.status.code for _, span in spans.values())
    gateway = spans[root][1]
    told = attributes(gateway)
    assert told["gen_ai.usage.output_tokens"] == TOKENS
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert [event.name for event in gateway.events] == ["queued", "placed", "first token", "completion"]
    decode = spans["decode"][1]
    assert attributes(decode)["gen_ai.usage.output_tokens"] == TOKENS
    assert attributes(spans["hand-off"][1])["branchline.kv_bytes"] > 0
    # The last token came from the decode worker before the gateway's span was over.
    completion = gateway.events[-1].time_unix_nano
    assert decode.start_time_unix_nano < completion <= gateway.end_time_unix_nano
    text = "".join(str(span) for _, span in spans.values())
    assert PROMPT.strip() not in text
    # The others began traces of their own.
    wait_until(lambda: len([1 for _, span in watched.collector.spans if not span.parent_span_id]) >= 3, 20, "others")


def test_logs_are_objects_with_the_request_s_id_and_without_its_text(watched: Watched) -> None:
    """One of the requests is followed through the processes."""
    spans = watched.collector.wait_for(TRACE, 5)
    request_id = attributes(spans["text_completion"][1])["gen_ai.response.id"]
    for role, log in watched.logs.items():
        assert PROMPT.strip() not in log
        assert HTTP_PROMPT not in log
        records = [json.loads(line) for line in log.splitlines()]
        assert records
        assert all(record["role"] == role for record in records)
        if role != "gateway":  # it says something only when something goes wrong
            assert [record for record in records if record.get("request_id") == request_id], role
    assert time.strftime("%Y-") in watched.logs["prefill"]
