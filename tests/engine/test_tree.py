from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from engine_helpers import random_parents
from hypothesis import given
from hypothesis import strategies as st

from branchline.config import ConfigError
from branchline.core import DraftTree
from branchline.engine.tree import StaticTree, topology_tensors
from branchline.engine.tree_spec import DEFAULT_CHOICES, TREE_FILE, parse_tree, resolve_tree


def test_an_inline_list_of_choices() -> None:
    tree = parse_tree("[[0],[1],[0,0],[0,1],[0,0,2]]")
    assert tree.parents == (0, 0, 1, 1, 3)
    assert (tree.num_nodes, tree.depth) == (5, 3)
    assert [tree.level(depth) for depth in range(4)] == [[0], [1, 2], [3, 4], [5]]
    assert [tree.inner_level(depth) for depth in range(4)] == [[0], [1], [3], []]


def test_the_other_forms(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    path.write_text("[[0], [0, 1]]")
    assert parse_tree(f"static:{path}").parents == (0, 1)
    assert parse_tree("chain:3").choices == ((0,), (0, 0), (0, 0, 0))
    assert parse_tree("none").num_nodes == 0
    assert parse_tree("default").choices == DEFAULT_CHOICES


def test_choices_out_of_order_are_put_parents_first() -> None:
    assert parse_tree("[[0,0],[0],[1]]").choices == ((0,), (1,), (0, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0],[1,0]]", "not connected"),
        ("[[0],[0]]", "twice"),
        ("[]", "between 1 and"),
        ("[[]]", "not a path of ranks"),
        ("[[0],[-1]]", "not a path of ranks"),
        ("[[0],[true]]", "not a path of ranks"),
        ("[[0],3]", "list of lists"),
        ("[[0]", "not a JSON list"),
        ("chain:0", "chain:K"),
        ("chain:two", "chain:K"),
        ("static:/does/not/exist", "No such file"),
        ("best:3", "a tree that a draft head brings"),
        ("bush", "must be none"),
    ],
)
def test_bad_trees_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.tree: ") as caught:
        parse_tree(text)
    assert message in str(caught.value)


def test_a_tree_needs_a_draft_head(tmp_path: Path) -> None:
    assert resolve_tree("default", lambda: None).num_nodes == 0
    assert resolve_tree("none", lambda: tmp_path).num_nodes == 0
    for text in ("chain:2", "best:2"):
        with pytest.raises(ConfigError, match="needs a draft head"):
            resolve_tree(text, lambda: None)


@pytest.mark.parametrize("text", ["none", "bush", "chain:0", "best:0", "best:few"])
def test_a_head_is_looked_for_only_where_a_good_tree_needs_one(text: str) -> None:
    def find() -> None:
        pytest.fail("looked for a head")

    with nullcontext() if text == "none" else pytest.raises(ConfigError, match=r"^model\.tree: "):
        resolve_tree(text, find)


def test_default_is_the_tree_that_the_head_brings(tmp_path: Path) -> None:
    assert resolve_tree("default", lambda: tmp_path).choices == DEFAULT_CHOICES
    (tmp_path / TREE_FILE).write_text('{"default": [[0], [0, 0], [1]], "best": []}')
    tree = resolve_tree("default", lambda: tmp_path)
    assert (tree.spec, tree.choices) == ("default", ((0,), (0, 0), (1,)))
    (tmp_path / TREE_FILE).write_text('{"default": "dynamic:3,2,6"}')
    tree = resolve_tree("default", lambda: tmp_path)
    assert (tree.spec, tree.depth, tree.num_nodes) == ("default", 3, 6)
    assert resolve_tree("chain:2", lambda: tmp_path).num_nodes == 2


def test_best_is_as_much_of_the_heads_list_as_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best:2 needs a draft head that brings a tree\.json"):
        resolve_tree("best:2", lambda: tmp_path)
    (tmp_path / TREE_FILE).write_text('{"default": "chain:1", "best": [[0], [1], [0, 0], [2]]}')
    tree = resolve_tree(" best:3", lambda: tmp_path)
    assert (tree.spec, tree.choices) == ("best:3", ((0,), (1,), (0, 0)))
    with pytest.raises(ConfigError, match=r"best:5 asks for 5 nodes, .*tree\.json lists 4"):
        resolve_tree("best:5", lambda: tmp_path)
    (tmp_path / TREE_FILE).write_text('{"best": [[1, 0], [1]]}')
    assert resolve_tree("best:2", lambda: tmp_path).choices == ((1,), (1, 0))
    with pytest.raises(ConfigError, match=r"tree\.json: not connected"):
        resolve_tree("best:1", lambda: tmp_path)
    (tmp_path / TREE_FILE).write_text("[[0]]")
    with pytest.raises(ConfigError, match="lists 0"):
        resolve_tree("best:1", lambda: tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"default": [[0], [1, 0]]}', "not connected"),
        ('{"default": []}', "between 1 and"),
        ('{"default": "dynamic:3"}', "three whole numbers"),
        ('{"default": "default"}', "needs a `default`"),
        ('{"default": "static:/another/tree.json"}', "needs a `default`"),
        ('{"best": [[0]]}', "needs a `default`"),
        ("[[0]]", "needs a `default`"),
        ('{"default": [[0]', "not JSON"),
        ("\xff", "not JSON"),
    ],
)
def test_a_damaged_tree_of_a_head_is_refused_by_its_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / TREE_FILE
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^model\.tree: ") as caught:
        resolve_tree("default", lambda: tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@given(st.integers(0, 2**32 - 1), st.integers(0, 70), st.integers(1, 3))
def test_depths_and_ancestors_follow_from_parents(seed: int, drafted: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parents = torch.stack([random_parents(generator, drafted) for _ in range(batch)])
    naive = [[_line(row, node) for node in range(drafted + 1)] for row in parents.tolist()]
    depth = max(len(line) for row in naive for line in row) - 1
    depths, ancestors = topology_tensors(parents, depth)
    for row, lines in enumerate(naive):
        for node, line in enumerate(lines):
            assert depths[row, node] == len(line) - 1
            assert ancestors[row, node].nonzero()[:, 0].tolist() == sorted(line)


def _line(parents: list[int], node: int) -> list[int]:
    line = [node]
    while parents[node] >= 0:
        node = parents[node]
        line.append(node)
    return line


def test_every_prefix_of_the_default_tree_is_a_tree() -> None:
    for size in range(1, len(DEFAULT_CHOICES) + 1):
        StaticTree("prefix", DEFAULT_CHOICES[:size])


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(0, 20), st.integers(0, 6))
def test_a_shipped_tree_is_cut_to_what_fits(seed: int, drafted: int, nodes: int, depth: int) -> None:
    parents = random_parents(torch.Generator().manual_seed(seed), drafted).tolist()
    tree = DraftTree(tuple(range(drafted)), tuple(parents[1:]), (0.0,) * drafted)
    lines = [tuple(_line(parents, node)[:-1]) for node in range(1, drafted + 1)]
    cut = tree.cut(nodes, depth)
    numbers = [0, *(token + 1 for token in cut.tokens)]  # tokens tell which nodes were kept
    kept = [tuple(_line([-1, *cut.parents], node)[:-1]) for node in range(1, len(cut) + 1)]
    expected = [line for line in lines if len(line) <= depth][:nodes]
    assert [tuple(numbers[node] for node in line) for line in kept] == expected
