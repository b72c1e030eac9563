"""Draft tree shapes: what may be configured, and what follows from a list of parents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from branchline.config import ConfigError

#: What `default` stands for: the shape with the most tokens per second for the default model and head on two cores, in
#: the order of measured acceptance (docs/engine.md). A better head or a faster machine wants a larger one.
DEFAULT_CHOICES: tuple[tuple[int, ...], ...] = ((0,), (1,), (0, 0), (2,), (0, 1))

MAX_NODES = 256
MAX_GUESSES = 64


@dataclass(frozen=True)
class TreeTopology:
    """A static tree. Node 0 is the root; node i stands for the path `choices[i - 1]`.

    A choice is a path of ranks as EAGLE and Medusa write it: (0, 1) is the second guess after the first guess.
    Parents come before their children, so every prefix is a valid tree.
    """

    spec: str
    choices: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        seen: set[tuple[int, ...]] = {()}
        for choice in self.choices:
            assert choice[:-1] in seen, f"{choice} comes before its parent"
            assert choice not in seen, f"{choice} twice"
            seen.add(choice)

    @property
    def num_nodes(self) -> int:
        """Drafted nodes: the root is not one."""
        return len(self.choices)

    @property
    def depth(self) -> int:
        return max((len(choice) for choice in self.choices), default=0)

    @property
    def parents(self) -> tuple[int, ...]:
        """Node number of each drafted node's parent."""
        number = {(): 0} | {choice: index + 1 for index, choice in enumerate(self.choices)}
        return tuple(number[choice[:-1]] for choice in self.choices)

    def level(self, depth: int) -> list[int]:
        """Node numbers at a depth, ascending; depth 0 is the root alone."""
        if depth == 0:
            return [0]
        return [index + 1 for index, choice in enumerate(self.choices) if len(choice) == depth]

    def inner_level(self, depth: int) -> list[int]:
        """The nodes of a depth that have children."""
        inner = set(self.parents)
        return [node for node in self.level(depth) if node in inner]


def topology_tensors(parents: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What verification needs, from parents alone, on the device.

    parents int64 `[batch, nodes]` of all nodes, the root's and an absent node's being -1; `depth` bounds the tree's.
    Returns depths int64 `[batch, nodes]` and ancestors-or-self bool `[batch, nodes, nodes]`.
    """
    nodes = parents.shape[1]
    number = torch.arange(nodes, device=parents.device)
    step = (parents[:, :, None] == number).float()
    ancestors = torch.eye(nodes, device=parents.device).expand_as(step)
    for _ in range(depth):  # after k rounds: all ancestors at most k levels up
        ancestors = torch.eye(nodes, device=parents.device) + step @ ancestors
    return ancestors.sum(2).long() - 1, ancestors > 0


def parse_tree(text: str) -> TreeTopology:
    """Reads `none`, `chain:K`, `static:FILE`, `default` or an inline JSON list of choices.

    Raises ConfigError naming `model.tree` for anything else, and for trees that are not connected, list a node twice
    or are too large.
    """
    text = text.strip()
    if text == "none":
        return TreeTopology("none", ())
    if text == "default":
        return TreeTopology("default", DEFAULT_CHOICES)
    if text.startswith("chain:"):
        return TreeTopology(text, tuple((0,) * (depth + 1) for depth in range(_chain_length(text))))
    if text.startswith("static:"):
        return TreeTopology(text, _checked_choices(_read_choices(Path(text.removeprefix("static:")))))
    if text.startswith("["):
        try:
            return TreeTopology(text, _checked_choices(json.loads(text)))
        except json.JSONDecodeError as error:
            raise ConfigError(f"model.tree: not a JSON list of choices: {error}") from error
    raise ConfigError(f"model.tree: must be none, default, chain:K, static:FILE or a list of choices, got {text!r}")


def resolve_tree(text: str, has_draft: bool) -> TreeTopology:
    """`parse_tree`, given whether there is a draft head: without one `default` means `none`; others are errors."""
    tree = parse_tree(text)
    if has_draft or tree.num_nodes == 0:
        return tree
    if tree.spec == "default":
        return TreeTopology("none", ())
    raise ConfigError(f"model.tree: {text} needs a draft head, and model.draft is none")


def _chain_length(text: str) -> int:
    length = text.removeprefix("chain:")
    if not length.isdecimal() or not 1 <= int(length) <= MAX_NODES:
        raise ConfigError(f"model.tree: chain:K needs K between 1 and {MAX_NODES}, got {length!r}")
    return int(length)


def _read_choices(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model.tree: {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.tree: {path} is not a JSON list of choices: {error}") from error


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
