"""From timed iterations to medians, ratios, targets and a table.

Ratios are medians of the rounds' own ratios: every round times every case once, so what disturbs the machine for a
while disturbs both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.engine_rig import PHASES, Timing
from branchline.engine.tree import TreeTopology

#: The sizes that the targets name.
TARGET_BATCH, TARGET_CONTEXT, TARGET_NODES, SHORT, LONG = 1, 512, 16, 128, 2048


@dataclass(frozen=True)
class Case:
    """What one timing is of."""

    tree: str
    batch: int
    context: int


Timings = Mapping[Case, list[Timing]]


def rows(timings: Timings, trees: Mapping[str, TreeTopology]) -> list[dict[str, Any]]:
    """One entry a case: milliseconds by phase, and the ratio to the plain step of the same batch and context."""
    return [_row(case, rounds, timings, trees[case.tree]) for case, rounds in timings.items()]


def targets(timings: Timings, trees: Mapping[str, TreeTopology]) -> list[dict[str, Any]]:
    """The issue's targets for the CPU beside what was measured; cases that were not timed are left out."""
    found = []
    for name, tree in trees.items():
        case = Case(name, TARGET_BATCH, TARGET_CONTEXT)
        if tree.num_nodes == TARGET_NODES and case in timings:
            found.append(_target(case, "iteration / plain step", to_plain(case, timings), 1.30 + 0.04 * tree.depth))
            found.append(_target(case, "(accept + rewind + host) / iteration", overhead(timings[case]), 0.06))
        for batch in sorted({case.batch for case in timings}):
            short, long = Case(name, batch, SHORT), Case(name, batch, LONG)
            if batch == TARGET_BATCH and short in timings and long in timings:
                found.append(_target(long, f"iteration / at {SHORT} tokens", ratio(long, short, timings), 1.25))
    return found


def to_plain(case: Case, timings: Timings) -> float | None:
    return ratio(case, Case("none", case.batch, case.context), timings)


def ratio(case: Case, other: Case, timings: Timings) -> float | None:
    """Median over the rounds of case / other; None when either was not timed."""
    if case not in timings or other not in timings:
        return None
    pairs = zip(timings[case], timings[other], strict=True)
    return round(statistics.median(a.total / b.total for a, b in pairs), 4)


def overhead(rounds: Iterable[Timing]) -> float | None:
    """The share of an iteration that neither verifies nor drafts; None where phases were not timed."""
    shares = [sum(t.phases[name] for name in ("accept", "rewind", "host")) / t.total for t in rounds if t.phases]
    return round(statistics.median(shares), 4) if shares else None


def summary(values: Iterable[float]) -> dict[str, float]:
    known = list(values)
    p90 = statistics.quantiles(known, n=10, method="inclusive")[8] if len(known) > 1 else known[0]
    return {"median": round(statistics.median(known), 4), "p90": round(p90, 4)}


def table(entries: list[dict[str, Any]]) -> str:
    """Medians in milliseconds, aligned."""
    head = ["tree", "nodes", "depth", "batch", "context", "iteration", "p90", *PHASES, "/ plain", "overhead"]
    lines = [head]
    for row in entries:
        phases = [_cell(row["ms"].get(phase, {}).get("median")) for phase in PHASES]
        share = "-" if row["overhead"] is None else f"{100 * row['overhead']:.1f} %"
        sizes = [str(row[name]) for name in ("nodes", "depth", "batch", "context")]
        whole = row["ms"]["iteration"]
        totals = [_cell(whole["median"]), _cell(whole["p90"])]
        lines.append([row["tree"], *sizes, *totals, *phases, _cell(row["to_plain"]), share])
    return aligned(lines)


def target_table(entries: list[dict[str, Any]]) -> str:
    lines = [["target", "tree", "batch", "context", "measured", "at most", "met"]]
    for entry in entries:
        sizes = [str(entry[name]) for name in ("tree", "batch", "context")]
        met = "yes" if entry["met"] else "NO"
        lines.append([entry["what"], *sizes, f"{entry['measured']:.3f}", f"{entry['at_most']:.3f}", met])
    return aligned(lines)


def product_table(products: dict[str, Any]) -> str:
    lines = [["matrix products alone", "rows", "ms", "/ one row"]]
    for entry in products["by_rows"]:
        lines.append(["", str(entry["rows"]), _cell(entry["ms"]), _cell(entry["to_one_row"])])
    return aligned(lines)


def _row(case: Case, rounds: list[Timing], timings: Timings, tree: TreeTopology) -> dict[str, Any]:
    phases = {name: summary(t.phases[name] for t in rounds) for name in PHASES if rounds[0].phases}
    return {
        "tree": case.tree,
        "nodes": tree.num_nodes,
        "depth": tree.depth,
        "batch": case.batch,
        "context": case.context,
        "ms": {"iteration": summary(t.total for t in rounds)} | phases,
        "to_plain": to_plain(case, timings),
        "overhead": overhead(rounds),
    }


def _target(case: Case, what: str, measured: float | None, at_most: float) -> dict[str, Any]:
    sizes = {"tree": case.tree, "batch": case.batch, "context": case.context}
    assert measured is not None, (what, case)
    return {"what": what, **sizes, "measured": measured, "at_most": round(at_most, 4), "met": measured <= at_most}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def aligned(lines: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
