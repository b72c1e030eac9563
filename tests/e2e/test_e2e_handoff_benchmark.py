"""The hand-off's benchmark runs, and what it writes is what it printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

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
    assert all(min(row[name] for name in ("gb_s", "bare_gb_s", "checked_gb_s", "ratio")) > 0 for row in rows)
    assert len(run.stdout.splitlines()) == 2 + len(rows)


def test_real_workers_leave_a_timeline_and_its_picture(tmp_path: Path) -> None:
    """The figures depend on the machine; that a prompt is prefilled once, and what the timeline must have, don't."""
    out = tmp_path / "workers.json"
    sizes = ["--timeline-tokens", "1100", "--rounds", "1", "--prompts", "2", "--max-tokens", "6", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.handoff_workers", "--provider", "reference", *sizes]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert result["repeated_prompt"]["once"]
    turns = result["second_turn"]
    [length], [held] = turns["second_turn_tokens"], turns["held_tokens"]
    assert turns["first_turn_tokens"] <= held < length, "a second turn was shipped whole"
    assert turns["kv_mib"][1] < turns["kv_mib"][0] / 5
    shown = result["timeline"]["round_shown_ms"]
    assert len(shown["chunks"]) == 3
    assert len(shown["draft_tree"]) == 1
    assert shown["ready"] > shown["chunks"][-1][1]
    assert {"first_step", "later_steps", "same_place"} <= set(result["first_steps"])
    picture = ElementTree.parse(out.with_suffix(".svg")).getroot()
    bars = [element for element in picture.iter("{http://www.w3.org/2000/svg}rect") if "stroke" in element.attrib]
    assert len(bars) == sum(len(shown[lane]) for lane in ("chunks", "draft_tree", "exports", "frames_sent"))
