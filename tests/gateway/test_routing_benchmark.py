"""The routing benchmark, small: every policy runs on one trace, and affinity finds more in the caches than chance."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import routing
from benchmarks.routing_trace import SHAPES, trace
from branchline.config import ROUTINGS


def test_all_policies_on_one_trace(tmp_path: Path) -> None:
    out, plot = tmp_path / "r.json", tmp_path / "r.svg"
    arguments = ["--trace", "mixed", "--rate", "3", "--seconds", "12", "--out", str(out), "--plot", str(plot)]
    assert routing.main(arguments) == 0
    rows = {row["policy"]: row for row in json.loads(out.read_text())["results"]}
    assert set(rows) == set(ROUTINGS)
    assert len({row["requests"] for row in rows.values()}) == 1
    assert rows["prefix_affinity"]["hit_rate"] > rows["power_of_two"]["hit_rate"] > 0
    for row in rows.values():
        assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"]
        assert min(row["spread"].values()) >= 1
    assert plot.read_text().count("<rect") == 1 + 2 * len(ROUTINGS)


def test_a_trace_is_its_seed_s() -> None:
    shape = SHAPES["mixed"]
    assert trace(shape, 3.0, 10.0, 1) == trace(shape, 3.0, 10.0, 1) != trace(shape, 3.0, 10.0, 2)
