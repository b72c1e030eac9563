"""Growing a dynamic tree (EAGLE-2: Li et al. 2024, arXiv 2406.16858), its shape decided on the device.

Every level's `top_k` likeliest nodes run through the draft head, and each gives its `top_k` likeliest children. All of
these are candidates; the likeliest `num_nodes` make the tree. A child is never likelier than its parent, so they are
connected. The shapes of all tensors are fixed by (depth, top_k, num_nodes); only what is in them follows the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchline.engine.draft import DraftHeads, GrownTree, Root, TreeDrafter
from branchline.engine.tree import DynamicTree

#: The parent of the root's children, among candidate numbers.
_ROOT = -1


@dataclass(frozen=True)
class _Candidates:
    """One level's, `[batch, n]` each: tokens and parents (candidate numbers) int64, cumulative log-scores float32."""

    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor


class DynamicGrower:
    """Grows trees of one (depth, top_k, num_nodes); implements `draft.TreeGrower`.

    The j-th node that runs through the head, counted from 0 over all levels, has the draft row behind the root's + j.
    """

    def __init__(self, tree: DynamicTree, device: torch.device) -> None:
        assert tree.num_nodes > 0
        self._tree = tree
        self._k = tree.top_k
        self._rank = torch.arange(tree.candidates_of(tree.depth, tree.top_k), device=device)
        self._rows = torch.eye(tree.draft_rows, dtype=torch.bool, device=device)

    def grow(self, drafter: TreeDrafter, root: Root) -> GrownTree:
        levels = [self._root_children(drafter, root)]
        level, heads = levels[0], root.heads
        first = 0  # candidate number of the level's first entry
        source = torch.zeros_like(level.tokens)  # each frontier node's parent, among those that ran before
        ancestors = self._rows[None, :1].expand(level.tokens.shape[0], -1, -1)
        frontier = torch.arange(self._k, device=level.tokens.device).expand_as(level.tokens)
        for depth in range(1, self._tree.depth):
            offsets = 1 + (depth - 1) * self._k + self._rank[None, : self._k]
            ancestors = _rows_at(ancestors, source) | self._rows.index_select(0, offsets[0])
            hidden = _rows_at(heads.recurrent, source)
            heads = drafter.run(root, level.tokens.gather(1, frontier), hidden, depth, offsets, ancestors)
            scores, numbers = level.scores.gather(1, frontier), first + frontier
            first += level.tokens.shape[1]
            level = self._children(drafter, root, heads, depth, scores, numbers)
            levels.append(level)
            # Children are listed parent by parent: a child's place tells which of the nodes that ran is its parent.
            frontier = level.scores.topk(self._k, 1).indices
            source = torch.div(frontier, self._k, rounding_mode="floor")
        return self._best(levels)

    def _root_children(self, drafter: TreeDrafter, root: Root) -> _Candidates:
        scores = torch.zeros_like(root.position, dtype=torch.float32)[:, None]
        return self._children(drafter, root, root.heads, 0, scores, torch.full_like(root.position, _ROOT)[:, None])

    def _children(
        self,
        drafter: TreeDrafter,
        root: Root,
        heads: DraftHeads,
        depth: int,
        scores: torch.Tensor,
        numbers: torch.Tensor,
    ) -> _Candidates:
        """The `top_k` likeliest children of each of the nodes of a depth: scores and candidate numbers `[batch, n]`."""
        gained, guesses = drafter.scores(root, heads, depth).topk(self._k, -1)
        total = scores[:, :, None] + gained.clamp(max=0.0)
        parents = numbers[:, :, None].expand_as(guesses)
        tokens = drafter.model.target_token_ids[guesses]
        return _Candidates(tokens.flatten(1), parents.flatten(1), total.flatten(1))

    def _best(self, levels: list[_Candidates]) -> GrownTree:
        """The likeliest nodes, the likeliest first. The sort is stable and parents are listed before their children, so
        a child that is as likely as its parent still comes behind it."""
        tokens = torch.cat([level.tokens for level in levels], 1)
        parents = torch.cat([level.parents for level in levels], 1)
        scores = torch.cat([level.scores for level in levels], 1)
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices
        number = torch.empty_like(order).scatter_(1, order, self._rank.expand_as(order) + 1)
        order = order[:, : self._tree.num_nodes]
        parents = parents.gather(1, order)
        numbered = torch.where(parents == _ROOT, 0, number.gather(1, parents.clamp(min=0)))
        return GrownTree(tokens.gather(1, order), numbered, scores.gather(1, order))


def _rows_at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values `[batch, n, width]`, index int64 `[batch, m]` -> `[batch, m, width]`."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
