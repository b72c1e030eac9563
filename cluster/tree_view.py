"""One decode iteration as a person reads it: the verified tree drawn, the accepted path marked, the rewind spelled out.

Plain values in, text or JSON out; knows neither engine nor tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from branchline.core import DraftTree, FinishReason

Text = Callable[[int], str]


@dataclass(frozen=True)
class Style:
    """ANSI sequences around what is accepted, what is the model's own, and what was drafted in vain."""

    accepted: str = ""
    bonus: str = ""
    rejected: str = ""
    end: str = ""


#: How to read `draw`.
LEGEND = (
    "● accepted  ○ not accepted  ★ the model's own next token; the draft head's cumulative probability; the cache row, "
    "and where the rewind moves it"
)
PLAIN = Style()
COLOURED = Style(accepted="\x1b[32m", bonus="\x1b[1;33m", rejected="\x1b[2m", end="\x1b[0m")


@dataclass(frozen=True)
class StepView:
    """What one iteration verified and emitted. `length` tokens were in the cache before it, `length_after` after it;
    `root` and `token_ids` are token ids; the tree's node i + 1 is its entry i."""

    number: int
    length: int
    length_after: int
    root: int
    tree: DraftTree
    token_ids: tuple[int, ...]
    finish: FinishReason | None

    @property
    def path(self) -> tuple[int, ...]:
        """Node numbers that the emitted tokens went through, the root first."""
        path = [0]
        for token_id in self.token_ids:
            child = self._child(path[-1], token_id)
            if child is None:
                break
            path.append(child)
        return tuple(path)

    @property
    def bonus(self) -> int | None:
        """The token that the model chose behind the path; None when a drafted token was the request's last."""
        return self.token_ids[-1] if len(self.path) == len(self.token_ids) else None

    @property
    def rows_before(self) -> tuple[int, ...]:
        """Cache rows of the path as it was verified: node n has the row `length` + n."""
        return tuple(self.length + node for node in self.path)

    @property
    def rows_after(self) -> tuple[int, ...]:
        return tuple(range(self.length, self.length + len(self.path)))

    def children(self, node: int) -> list[int]:
        return [number for number, parent in enumerate(self.tree.parents, 1) if parent == node]

    def probability(self, node: int) -> float:
        """The draft head's cumulative probability of a node; with a temperature, noise included."""
        return math.exp(self.tree.scores[node - 1])

    def _child(self, node: int, token_id: int) -> int | None:
        return next((child for child in self.children(node) if self.tree.tokens[child - 1] == token_id), None)


def visible(text: str, token_id: int) -> str:
    """A token's text in quotes, spaces and line breaks to be seen; a token that is no whole character by its id."""
    return f"<token {token_id}>" if not text or "\N{REPLACEMENT CHARACTER}" in text else repr(text)


def draw(view: StepView, text: Text, style: Style = PLAIN) -> list[str]:
    """The step in lines; `text` gives a token's text."""
    count = len(view.tree)
    head = f"step {view.number}: {view.length} tokens in the cache, {count} drafted node{'s' if count != 1 else ''}"
    lines = [head, f"  {style.accepted}{visible(text(view.root), view.root)}{style.end}  root, row {view.length}"]
    lines += [f"  {line}" for line in _branches(view, 0, "", text, style)]
    moved = " (in place)" if view.rows_before == view.rows_after else ""
    rows = " -> ".join(", ".join(map(str, rows)) for rows in (view.rows_before, view.rows_after))
    lines.append(f"  rewind: rows {rows}{moved}; length {view.length} -> {view.length_after}")
    emitted = ", ".join(visible(text(token_id), token_id) for token_id in view.token_ids)
    finish = f" ({view.finish})" if view.finish else ""
    lines.append(f"  emitted {len(view.token_ids)}: {emitted}{finish}")
    return lines


def to_json(view: StepView, text: Text) -> dict[str, Any]:
    """The same as one JSON object."""

    def token(token_id: int) -> dict[str, Any]:
        return {"token_id": token_id, "text": text(token_id)}

    accepted = set(view.path)
    nodes = [
        {
            "node": number,
            "parent": view.tree.parents[number - 1],
            **token(view.tree.tokens[number - 1]),
            "probability": round(view.probability(number), 6),
            "row": view.length + number,
            "accepted": number in accepted,
        }
        for number in range(1, len(view.tree) + 1)
    ]
    return {
        "step": view.number,
        "length": view.length,
        "length_after": view.length_after,
        "root": token(view.root),
        "nodes": nodes,
        "path": list(view.path),
        "bonus": None if view.bonus is None else token(view.bonus),
        "rows_before": list(view.rows_before),
        "rows_after": list(view.rows_after),
        "tokens": [token(token_id) for token_id in view.token_ids],
        "finish": view.finish,
    }


def _branches(view: StepView, node: int, indent: str, text: Text, style: Style) -> Iterator[str]:
    """The subtree under a node, likeliest first as drafted, the bonus token below its drafted siblings."""
    children = view.children(node)
    bonus = view.bonus if node == view.path[-1] else None
    for index, child in enumerate(children):
        last = index == len(children) - 1 and bonus is None
        yield f"{indent}{'└─' if last else '├─'}{_node(view, child, text, style)}"
        yield from _branches(view, child, indent + ("   " if last else "│  "), text, style)
    if bonus is not None:
        yield f"{indent}└─★ {style.bonus}{visible(text(bonus), bonus)}  bonus{style.end}"


def _node(view: StepView, node: int, text: Text, style: Style) -> str:
    token_id, row = view.tree.tokens[node - 1], view.length + node
    label = f"{visible(text(token_id), token_id)}  {view.probability(node):.3f}  row {row}"
    if node not in view.path:
        return f"○ {style.rejected}{label}{style.end}"
    target = view.length + view.path.index(node)
    return f"● {style.accepted}{label}{f' -> {target}' if target != row else ''}{style.end}"
