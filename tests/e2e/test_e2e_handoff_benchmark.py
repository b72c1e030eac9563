"""The hand-off's benchmark runs, and what it writes is what it printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.local_system import REPOSITORY

pytestmark = pytest.mark.wire


def test_it_writes_a_row_for_each_case(tmp_path: Path) -> None:
    out = tmp_path / "handoff.json"
    command = [sys.executable, "-m", "benchmarks.handoff", "--shape", "tiny", "--tokens", "40", "600", "--streams", "1",
               "2", "--rounds", "1", "--out", str(out)]  # fmt: skip
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())["results"]
    assert [(row["tokens"], row["streams"]) for row in rows] == [(40, 1), (40, 2), (600, 1), (600, 2)]
    assert all(row["gb_s"] > 0 and row["bare_gb_s"] > 0 and row["ratio"] > 0 for row in rows)
    assert len(run.stdout.splitlines()) == 1 + len(rows)
