"""The gateway's benchmark runs, every stream comes whole, and nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.local_system import REPOSITORY

pytestmark = pytest.mark.wire


def test_it_measures_every_way(tmp_path: Path) -> None:
    """A stream that is cut short ends it with an error."""
    out = tmp_path / "gateway.json"
    sizes = ["--rounds", "1", "--scale", "0.05", "--streams", "0.1", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.gateway", *sizes]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert result["requests_left"] == 0
    assert set(result["results"]) == {"latency", "rate", "crowd"}
    for rows in result["results"].values():
        assert set(rows) == {"straight", "grpc", "http"}
        assert all(row["p99_ms"] >= row["p50_ms"] >= 0 for row in rows.values())
    rate = result["results"]["rate"]
    assert all(rate[way]["messages_core_s"] > 0 for way in ("grpc", "http"))
    assert "requests left in the gateway: 0" in run.stdout
