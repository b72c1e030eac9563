"""The rendered monitoring: its queries, the metrics that they name, and Prometheus's own tool."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from chart import Manifest, Objects, render

#: Debian's package `prometheus` has both.
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
PORT = 9101
VALUES: Manifest = {
    "ports": {"metrics": PORT},
    "networkPolicy": {"scrapers": [{"namespaceSelector": {"matchLabels": {"team": "watch"}}}]},
    "monitoring": {name: {"enabled": True} for name in ("serviceMonitor", "rules", "dashboard")},
}
#: What Grafana fills in.
VARIABLES = {"$namespace": "default", "$job": "demo-metrics", "$__rate_interval": "1m"}


def rules(objects: Objects | None = None) -> list[Manifest]:
    (group,) = (objects or render(VALUES)).get("PrometheusRule")["spec"]["groups"]
    found: list[Manifest] = group["rules"]
    return found


def dashboard() -> Manifest:
    loaded: Manifest = json.loads(render(VALUES).get("ConfigMap", "dashboard")["data"]["demo.json"])
    return loaded


def panel_queries() -> list[str]:
    """The dashboard's queries as Prometheus gets them."""
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    for name, value in VARIABLES.items():
        queries = [query.replace(name, value) for query in queries]
    assert not any("$" in query for query in queries)
    return queries


def named(query: str) -> set[str]:
    """The metrics that a query names."""
    return set(re.findall(r"\b(?:branchline|process)_\w+", re.sub(r'"[^"]*"', "", query)))


def promtool(*arguments: str) -> str:
    """What it prints. Fails when it finds something wrong."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def prometheus(directory: Path, port: int, targets: Sequence[str]) -> Iterator[Callable[[str], list[Any]]]:
    """A Prometheus that scrapes once a second, with the labels that the chart's ServiceMonitor gives. Yields what asks
    it: the samples of a query now. Raises OSError while it doesn't answer, and for a query that it refuses."""
    assert PROMETHEUS is not None
    labelled = {"targets": list(targets), "labels": {"namespace": VARIABLES["$namespace"]}}
    scrape = {"job_name": VARIABLES["$job"], "scrape_interval": "1s", "static_configs": [labelled]}
    file = write(directory / "prometheus.yaml", {"scrape_configs": [scrape]})
    address = f"127.0.0.1:{port}"
    flags = [f"--config.file={file}", f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address={address}"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([PROMETHEUS, *flags], stdout=log, stderr=log)

    def ask(query: str) -> list[Any]:
        asked = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(asked, timeout=10) as response:
            samples: list[Any] = json.load(response)["data"]["result"]
        return samples

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(20)


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
