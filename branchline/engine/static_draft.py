"""Growing a static tree: which guess goes where is known beforehand, so every level is a few index operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchline.engine.draft import GrownTree, Root, TreeDrafter
from branchline.engine.tree import StaticTree


@dataclass(frozen=True)
class _Level:
    """How one level is grown; index tensors on the device.

    The level's inner nodes run through the draft head; each child then takes one of its parent's guesses.
    """

    nodes: torch.Tensor  # int64 [inner]: node numbers, relative cache rows
    source: torch.Tensor  # int64 [inner]: index of each one's parent among the level above's inner nodes
    ancestors: torch.Tensor  # bool [1, inner, nodes + 1]
    guesses: int  # the most that any of them needs
    children: torch.Tensor  # int64 [children]: node numbers
    child_parent: torch.Tensor  # int64 [children]: index among `nodes`
    child_rank: torch.Tensor  # int64 [children]


class StaticGrower:
    """Grows one static tree; implements `draft.TreeGrower`. A node's draft row is the root's + node number."""

    def __init__(self, tree: StaticTree, device: torch.device) -> None:
        assert tree.num_nodes > 0
        self._nodes = tree.num_nodes
        self._parents = torch.tensor([tree.parents], dtype=torch.int64, device=device)
        self._levels = [_plan_level(tree, depth, device) for depth in range(tree.depth)]

    def grow(self, drafter: TreeDrafter, root: Root) -> GrownTree:
        batch, heads = root.position.shape[0], root.heads
        tokens = torch.zeros((batch, self._nodes + 1), dtype=torch.int64, device=root.position.device)
        scores = torch.zeros((batch, self._nodes + 1), dtype=torch.float32, device=root.position.device)
        for depth, level in enumerate(self._levels):
            if depth > 0:
                hidden = heads.recurrent.index_select(1, level.source)
                level_tokens = tokens.index_select(1, level.nodes)
                heads = drafter.run(root, level_tokens, hidden, depth, level.nodes[None], level.ancestors)
            gained, guesses = drafter.scores(root, heads, depth).topk(level.guesses, -1)
            picked = guesses[:, level.child_parent, level.child_rank]
            tokens.index_copy_(1, level.children, drafter.model.target_token_ids[picked])
            above = scores.index_select(1, level.nodes.index_select(0, level.child_parent))
            scores.index_copy_(1, level.children, above + gained[:, level.child_parent, level.child_rank])
        return GrownTree(tokens[:, 1:], self._parents.expand(batch, -1), scores[:, 1:])


def _plan_level(tree: StaticTree, depth: int, device: torch.device) -> _Level:
    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    parents = (-1, *tree.parents)
    inner = tree.inner_level(depth)
    above = tree.inner_level(depth - 1) if depth > 0 else []
    children = tree.level(depth + 1)
    ancestors = torch.zeros((1, len(inner), tree.num_nodes + 1), dtype=torch.bool)
    for row, node in enumerate(inner):
        while node >= 0:
            ancestors[0, row, node] = True
            node = parents[node]
    return _Level(
        nodes=tensor(inner),
        source=tensor([above.index(parents[node]) for node in inner] if depth > 0 else []),
        ancestors=ancestors.to(device),
        guesses=1 + max(tree.choices[child - 1][-1] for child in children),
        children=tensor(children),
        child_parent=tensor([inner.index(parents[child]) for child in children]),
        child_rank=tensor([tree.choices[child - 1][-1] for child in children]),
    )
