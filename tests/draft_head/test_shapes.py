from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchline.engine.tree import StaticTree
from tools.draft_head.shapes import NodeCounts, Path, in_order, probabilities


def all_paths(ranks: int, depth: int) -> list[Path]:
    paths: list[Path] = [()]
    for path in paths:
        if len(path) < depth:
            paths += [(*path, rank) for rank in range(ranks)]
    return paths[1:]


#: Small enough that every tree within it can be tried.
SMALL = all_paths(2, 3)


@st.composite
def counted(draw: st.DrawFn, nodes: list[Path] = SMALL) -> NodeCounts:
    """Counts as texts give them: at each accepted node at most one child is accepted too."""
    left = {(): draw(st.integers(0, 40))}
    counts: dict[Path, int] = {}
    steps = left[()]
    for path in nodes:
        counts[path] = draw(st.integers(0, left[path[:-1]]))
        left[path[:-1]] -= counts[path]
        left[path] = counts[path]
    return NodeCounts(steps, counts)


def expected_length(nodes: tuple[Path, ...], counts: NodeCounts) -> float:
    return 1.0 + sum(counts.accepted[path] for path in nodes) / max(counts.steps, 1)


def is_tree(nodes: tuple[Path, ...]) -> bool:
    return all(not path[:-1] or path[:-1] in nodes for path in nodes)


@given(counted(), st.integers(1, 6))
@settings(deadline=None)
def test_no_tree_of_a_size_accepts_more(counts: NodeCounts, size: int) -> None:
    chances = {path: count / max(counts.steps, 1) for path, count in counts.accepted.items()}
    found = in_order(chances)[:size]
    assert StaticTree("found", found).num_nodes == size  # connected, parents first
    lengths = [expected_length(nodes, counts) for nodes in combinations(SMALL, size) if is_tree(nodes)]
    assert expected_length(found, counts) == pytest.approx(max(lengths))


@given(counted(all_paths(3, 3)))
def test_smoothed_chances_make_trees_too(counts: NodeCounts) -> None:
    chances = probabilities(counts)
    assert chances.keys() == counts.accepted.keys()
    assert all(0 <= chances[path] <= chances.get(path[:-1], 1.0) for path in chances)
    StaticTree("found", in_order(chances))


def test_what_was_counted_often_stays_as_it_was_counted() -> None:
    counts = NodeCounts(100_000, {(0,): 60_000, (1,): 10_000, (0, 0): 50_000, (1, 0): 1})
    for path, chance in probabilities(counts).items():
        assert chance == pytest.approx(counts.accepted[path] / counts.steps, abs=2e-3)


def test_a_node_that_was_hardly_reached_is_judged_by_its_rank() -> None:
    # (1, 0) was tried once and failed; first guesses hold nine times of ten elsewhere.
    counts = NodeCounts(1000, {(0,): 900, (1,): 1, (0, 0): 810, (1, 0): 0})
    chances = probabilities(counts)
    assert chances[1, 0] > 0.5 * chances[1,]
