"""The progress line."""

from __future__ import annotations

import itertools

import pytest

from tools.draft_head.progress import Progress


def test_rate_and_time_left_are_of_this_run() -> None:
    said: list[str] = []
    seconds = itertools.count(0.0, 4.0)
    with Progress(1000, "tokens", said.append, done=500, terminal=False, clock=lambda: next(seconds)) as progress:
        for _ in range(4):
            progress.add(50)
    # Calls of the clock are four seconds apart, so the first report comes with the third call.
    assert said[0].startswith("650 of 1,000 tokens (65 %), ")
    assert said[-1].startswith("700 of 1,000 tokens (70 %), ")
    assert "left" in said[-1]


def test_figures() -> None:
    now = [0.0]
    progress = Progress(10_000, "steps", print, done=1_000, terminal=False, clock=lambda: now[0])
    now[0] = 9.0
    progress.add(900, "loss 1.5")
    assert progress.line() == "1,900 of 10,000 steps (19 %), 100/s, 81 s left; loss 1.5"
    now[0] = 900.0
    assert progress.line() == "1,900 of 10,000 steps (19 %), 1.0/s, 2 h 15 min left; loss 1.5"


def test_a_terminal_has_one_line_that_is_rewritten(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    now = [0.0]
    with Progress(2, "files", said.append, terminal=True, clock=lambda: now[0]) as progress:
        for _ in range(2):
            now[0] += 1
            progress.add(1)
    shown = capsys.readouterr().err
    assert shown.count("\r") == 3
    assert shown.count("\n") == 1
    assert shown.rstrip().endswith("2 of 2 files (100 %), 1.0/s")
    assert not said
