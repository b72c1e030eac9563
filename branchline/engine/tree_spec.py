"""The draft tree as it is configured: the forms that `model.tree` takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from branchline.config import ConfigError
from branchline.engine.tree import DynamicTree, StaticTree, TreeTopology

#: In a draft head's directory: the trees that suit it, as the tool that trains heads measured (docs/draft-heads.md). A
#: JSON object. `default`, a list of choices, or `chain:K` or `dynamic:…`, brings the most tokens per second; `best`
#: lists nodes by how often they are accepted, so that its first N are the static tree of N nodes that accepts most.
TREE_FILE = "tree.json"

#: What `default` stands for with a head that brings no tree of its own: a small shape that an undertrained head on two
#: cores gains from, in the order of measured acceptance. A better head or a faster machine wants a larger one.
DEFAULT_CHOICES: tuple[tuple[int, ...], ...] = ((0,), (1,), (0, 0), (2,), (0, 1))

MAX_NODES = 256
MAX_GUESSES = 64


def parse_tree(text: str) -> TreeTopology:
    """Reads `none`, `chain:K`, `static:FILE`, `dynamic:DEPTH,TOPK,NODES`, `default` or an inline JSON list of choices.

    Raises ConfigError naming `model.tree` for anything else, and for trees that are not connected, list a node twice
    or are too large.
    """
    text = text.strip()
    if text == "none":
        return StaticTree("none", ())
    if text == "default":
        return StaticTree("default", DEFAULT_CHOICES)
    if text.startswith("chain:"):
        length = _number("chain:K", text.removeprefix("chain:"))
        return StaticTree(text, tuple((0,) * depth for depth in range(1, length + 1)))
    if text.startswith("dynamic:"):
        return _dynamic(text)
    if text.startswith("static:"):
        return StaticTree(text, _checked_choices(_read_json(Path(text.removeprefix("static:")))))
    if text.startswith("best:"):
        raise ConfigError(f"model.tree: {text} is a tree that a draft head brings, and here is no head to ask")
    if text.startswith("["):
        try:
            return StaticTree(text, _checked_choices(json.loads(text)))
        except json.JSONDecodeError as error:
            raise ConfigError(f"model.tree: not a JSON list of choices: {error}") from error
    raise ConfigError(
        "model.tree: must be none, default, best:N, chain:K, static:FILE, dynamic:DEPTH,TOPK,NODES or a list of "
        f"choices, got {text!r}"
    )


def resolve_tree(text: str, find_head: Callable[[], Path | None]) -> TreeTopology:
    """`parse_tree`, with the trees that a draft head brings: `default` is the head's own where it has one, and `none`
    without a head; `best:N` is its best static tree of N nodes. The head's directory is asked for once the text is
    known to be right, and not for `none`. Raises ConfigError as `parse_tree`, and for trees that lack their head."""
    text = text.strip()
    nodes = _number("best:N", text.removeprefix("best:")) if text.startswith("best:") else 0
    tree = None if nodes else parse_tree(text)
    if tree is not None and tree.num_nodes == 0:
        return tree
    head = find_head()
    if text == "default":
        return StaticTree("none", ()) if head is None else _default_of(head)
    if head is None:
        raise ConfigError(f"model.tree: {text} needs a draft head, and model.draft is none")
    return _best_of(head, text, nodes) if tree is None else tree


def _default_of(head: Path) -> TreeTopology:
    """What `default` stands for with this head."""
    path = head / TREE_FILE
    if not path.exists():
        return parse_tree("default")
    chosen = _read_trees(path).get("default")
    if isinstance(chosen, str) and not chosen.startswith(("chain:", "dynamic:")):
        chosen = None  # a file that points to yet another one would be a riddle
    if not isinstance(chosen, str | list):
        raise ConfigError(
            f"model.tree: {path}: needs a `default`: a list of choices, chain:K or dynamic:DEPTH,TOPK,NODES"
        )
    return _named("default", chosen, path)


def _best_of(head: Path, text: str, nodes: int) -> TreeTopology:
    """The first nodes of those that the head's file lists."""
    path = head / TREE_FILE
    if not path.exists():
        raise ConfigError(f"model.tree: {text} needs a draft head that brings a {TREE_FILE}, and {head} has none")
    listed = _read_trees(path).get("best")
    if not isinstance(listed, list) or len(listed) < nodes:
        most = len(listed) if isinstance(listed, list) else 0
        raise ConfigError(f"model.tree: {text} asks for {nodes} nodes, {path} lists {most} under `best`")
    return _named(text, listed[:nodes], path)


def _named(spec: str, chosen: str | list[Any], path: Path) -> TreeTopology:
    """The tree that a head's file has for `spec`; its errors name the file."""
    try:
        tree = parse_tree(chosen if isinstance(chosen, str) else json.dumps(chosen))
    except ConfigError as error:
        raise ConfigError(f"model.tree: {path}: {str(error).removeprefix('model.tree: ')}") from error
    return dataclasses.replace(tree, spec=spec)


def _read_trees(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    return value if isinstance(value, dict) else {}


def _number(form: str, text: str) -> int:
    """The number of nodes in a text of a form such as `chain:K`."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_NODES:
        raise ConfigError(f"model.tree: {form} needs {form[-1]} between 1 and {MAX_NODES}, got {text!r}")
    return int(text)


def _dynamic(text: str) -> DynamicTree:
    numbers = text.removeprefix("dynamic:").split(",")
    if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers):
        raise ConfigError(f"model.tree: dynamic:DEPTH,TOPK,NODES needs three whole numbers, got {text!r}")
    depth, top_k, nodes = map(int, numbers)
    for name, value, limit in (("DEPTH", depth, MAX_NODES), ("TOPK", top_k, MAX_GUESSES), ("NODES", nodes, MAX_NODES)):
        if not 1 <= value <= limit:
            raise ConfigError(f"model.tree: {name} must be between 1 and {limit}, got {value} in {text!r}")
    depth = min(depth, nodes)
    if nodes > (candidates := DynamicTree.candidates_of(depth, top_k)):
        raise ConfigError(f"model.tree: {text} asks for {nodes} nodes, but {depth} levels of {top_k} give {candidates}")
    return DynamicTree(text, depth, top_k, nodes)


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model.tree: {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.tree: {path} is not JSON: {error}") from error


def _checked_choices(value: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(choice, list) for choice in value):
        raise ConfigError("model.tree: choices must be a list of lists of ranks, such as [[0],[1],[0,0]]")
    if not 1 <= len(value) <= MAX_NODES:
        raise ConfigError(f"model.tree: must have between 1 and {MAX_NODES} nodes, has {len(value)}")
    choices = [tuple(choice) for choice in value]
    for choice in choices:
        if not choice or not all(type(rank) is int and 0 <= rank < MAX_GUESSES for rank in choice):
            raise ConfigError(f"model.tree: {list(choice)} is not a path of ranks between 0 and {MAX_GUESSES - 1}")
        if choice[:-1] and choice[:-1] not in choices:
            raise ConfigError(f"model.tree: not connected: {list(choice)} is there without {list(choice[:-1])}")
    if len(set(choices)) != len(choices):
        raise ConfigError("model.tree: lists a node twice")
    rank = {choice: index for index, choice in enumerate(choices)} | {(): -1}
    in_order = all(rank[choice[:-1]] < index for index, choice in enumerate(choices))
    return tuple(choices if in_order else sorted(choices, key=len))
