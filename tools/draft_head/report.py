"""An evaluation as JSON, as the head's tree file, and as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from branchline.engine.tree import StaticTree, TreeTopology
from tools.draft_head.foresee import DEPTH, GUESSES, Text, accept
from tools.draft_head.measure import Tally

PLAIN = "none"
#: How the trees are called that the search found, as `--tree` calls them.
BEST = "best:"
#: A list of numbers, or of such lists, that `json.dumps` has spread over lines.
_SPREAD = re.compile(r"\[[\s\d.,\[\]-]*\]")


def foreseen(trees: Mapping[str, TreeTopology], texts: Mapping[float, Sequence[Text]]) -> list[dict[str, Any]]:
    """One entry a static tree and temperature: what it would accept of the texts."""
    entries = []
    for name, tree in trees.items():
        if isinstance(tree, StaticTree) and tree.num_nodes and tree.depth <= DEPTH and tree.guesses <= GUESSES:
            for temperature, told in texts.items():
                figures = accept(told, frozenset(tree.choices)).figures()
                kept = {key: figures[key] for key in ("acceptance_length", "by_depth", "by_category")}
                entries.append({"tree": name, "temperature": temperature} | kept)
    return entries


def shape(tree: TreeTopology) -> dict[str, Any]:
    """`configured`: what `--tree` takes for it."""
    configured: Any = tree.spec
    if isinstance(tree, StaticTree):
        configured = [list(choice) for choice in tree.choices] or PLAIN
    return {"nodes": tree.num_nodes, "depth": tree.depth, "configured": configured}


def runs(tallies: Mapping[tuple[str, float], Tally], temperatures: Iterable[float]) -> list[dict[str, Any]]:
    """One entry a tree and temperature, with the ratio to plain decoding at that temperature; then one a tree over all
    temperatures, by whose tokens per second the default is chosen."""
    entries = []
    names = dict.fromkeys(name for name, _ in tallies)
    for name in names:
        for temperature in temperatures:
            tally, plain = tallies[name, temperature], tallies[PLAIN, temperature]
            entries.append({"tree": name, "temperature": temperature} | tally.figures() | _gain(tally, plain))
        overall, plain = (sum((tallies[each, t] for t in temperatures), Tally()) for each in (name, PLAIN))
        entries.append({"tree": name, "temperature": "all"} | overall.figures() | _gain(overall, plain))
    return entries


def _gain(tally: Tally, plain: Tally) -> dict[str, float]:
    return {"to_plain": round(tally.tokens_per_s / plain.tokens_per_s, 4) if plain.tokens_per_s else 0.0}


def run_of(evaluation: Mapping[str, Any], tree: str, temperature: float | str) -> dict[str, Any]:
    return next(dict(e) for e in evaluation["runs"] if (e["tree"], e["temperature"]) == (tree, temperature))


def fastest(evaluation: Mapping[str, Any]) -> str:
    """The tree with the most tokens per second over all temperatures; plain decoding is none."""
    names: list[str] = [name for name in evaluation["trees"] if name != PLAIN]
    return max(names, key=lambda name: float(run_of(evaluation, name, "all")["tokens_per_s"]))


def tree_file(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine takes for `default` and `best:N` with this head, and what was measured."""
    chosen = fastest(evaluation)
    trees = evaluation["trees"]
    overall = run_of(evaluation, chosen, "all")
    measured = {name: overall[name] for name in ("acceptance_length", "tokens_per_s", "to_plain")}
    machine = {name: evaluation["machine"][name] for name in ("processor", "gpu", "date")}
    return {
        "default": trees[chosen]["configured"],
        "best": evaluation["best"],
        "measured": measured | {"temperatures": evaluation["key"]["settings"]["temperatures"]} | machine,
    }


def table(evaluation: Mapping[str, Any]) -> str:
    """Markdown: acceptance length, tokens per second and their ratio to plain decoding, by tree and temperature."""
    temperatures = evaluation["key"]["settings"]["temperatures"]
    head = ["tree", "nodes", "depth"]
    head += [f"{what} at {t:g}" for t in temperatures for what in ("length", "tokens/s", "x plain")]
    rows = []
    for name, tree in evaluation["trees"].items():
        row = [f"`{name}`", str(tree["nodes"]), str(tree["depth"])]
        for temperature in temperatures:
            run = run_of(evaluation, name, temperature)
            row += [f"{run['acceptance_length']:.2f}", f"{run['tokens_per_s']:.1f}", f"{run['to_plain']:.2f}"]
        rows.append(row)
    return markdown(head, rows)


def foreseen_table(evaluation: Mapping[str, Any]) -> str:
    """Markdown: what the static trees would accept of the other prompts' answers."""
    temperatures = evaluation["key"]["settings"]["temperatures"]
    lengths = {(run["tree"], run["temperature"]): run["acceptance_length"] for run in evaluation["foreseen"]["runs"]}
    head = ["tree", *(f"length at {temperature:g}" for temperature in temperatures)]
    names = dict.fromkeys(name for name, _ in lengths)
    return markdown(head, [[f"`{name}`", *(f"{lengths[name, heat]:.2f}" for heat in temperatures)] for name in names])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def verdict(evaluation: Mapping[str, Any]) -> str:
    """One line: what the default is, and what it gains."""
    chosen = fastest(evaluation)
    gain = float(run_of(evaluation, chosen, "all")["to_plain"])
    line: str = f"default: {chosen}, {gain:.2f} times the tokens per second of plain decoding, over all temperatures"
    return line if gain > 1 else f"{line}: on this machine the head is no gain"


def dumps(value: object) -> str:
    """Indented JSON in which lists of numbers, paths and their lists, stay on a line."""
    return _SPREAD.sub(lambda match: re.sub(r"\s+", "", match[0]).replace(",", ", "), json.dumps(value, indent=1))
