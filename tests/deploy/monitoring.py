"""The rendered monitoring: its queries, the metrics that they name, and Prometheus's own tool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
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


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
