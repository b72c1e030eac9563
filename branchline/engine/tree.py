"""Draft tree shapes, and what follows from a list of parents.

Node 0 is the root, the last accepted token; the drafted nodes are 1 … N, parents before their children, the best first.
So every prefix of a tree is a tree, and the best of its size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StaticTree:
    """A tree whose shape never changes. Node i stands for the path `choices[i - 1]`.

    A choice is a path of ranks as EAGLE and Medusa write it: (0, 1) is the second guess after the first guess.
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
    def draft_rows(self) -> int:
        """Draft cache rows from the root on that growing the tree writes to: one for each node."""
        return self.num_nodes + 1

    @property
    def guesses(self) -> int:
        """The most children that any node has, counted by rank."""
        return 1 + max((choice[-1] for choice in self.choices), default=-1)

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

    def cut(self, nodes: int) -> StaticTree:
        """The best tree of at most `nodes` nodes within this one."""
        return dataclasses.replace(self, choices=self.choices[:nodes])


@dataclass(frozen=True)
class DynamicTree:
    """A tree whose shape follows the draft head's confidence, as in EAGLE-2 (Li et al. 2024, arXiv 2406.16858).

    The head runs over the `top_k` likeliest nodes of each level, each giving `top_k` children, `depth` levels deep; the
    `num_nodes` likeliest of all of these make the tree.
    """

    spec: str
    depth: int
    top_k: int
    num_nodes: int

    def __post_init__(self) -> None:
        assert self.num_nodes == 0 or 1 <= self.depth <= self.num_nodes, self
        assert self.top_k >= 1, self
        assert self.num_nodes <= self.candidates_of(self.depth, self.top_k), self

    @staticmethod
    def candidates_of(depth: int, top_k: int) -> int:
        """Nodes that are looked at: the root's children, then those of each level's `top_k` best."""
        return top_k + max(depth - 1, 0) * top_k**2

    @property
    def draft_rows(self) -> int:
        """The root's, then one for each node that the head runs over: no children are asked of the last level."""
        return 1 + max(self.depth - 1, 0) * self.top_k

    @property
    def guesses(self) -> int:
        return self.top_k

    def cut(self, nodes: int) -> DynamicTree:
        """The same tree with at most `nodes` nodes."""
        nodes = min(nodes, self.num_nodes)
        return dataclasses.replace(self, num_nodes=nodes, depth=min(self.depth, nodes))


TreeTopology = StaticTree | DynamicTree


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
