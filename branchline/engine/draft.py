"""Drafting: the line of accepted tokens through the draft head, then a tree behind it, level by level.

Draft row j holds the pair (target's hidden state at j - 1, token j), at RoPE position j - 1, in the draft cache's slot
for token position j. Rows up to the root are a line, rewritten from the accepted path; the nodes that the head
runs over while the tree grows have rows behind the root's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from branchline.engine.attention import PagedAttention
from branchline.engine.cache import BlockTables, PagedKvCache
from branchline.engine.models.protocol import DraftModel
from branchline.engine.sampling import SamplingTensors, SamplingVariant, draft_scores


@dataclass(frozen=True)
class DraftHeads:
    """What some nodes hand to the next level: `[batch, n, hidden_size]` each."""

    normed: torch.Tensor
    recurrent: torch.Tensor


@dataclass(frozen=True)
class Root:
    """Where a tree is to grow. position, start int64 `[batch]`: the root's row and the first row that exists; `keep`
    bool `[batch]` is false for slots whose rows must not be written; `heads` is the root row's state, n = 1."""

    heads: DraftHeads
    position: torch.Tensor
    start: torch.Tensor
    keep: torch.Tensor
    block_tables: BlockTables
    sampling: SamplingTensors
    variant: SamplingVariant


@dataclass(frozen=True)
class GrownTree:
    """tokens and parents (node numbers) int64, cumulative log-scores float32, `[batch, nodes]` each."""

    tokens: torch.Tensor
    parents: torch.Tensor
    scores: torch.Tensor


class TreeGrower(Protocol):
    """One way to grow a tree: `static_draft` or `dynamic_draft`."""

    def grow(self, drafter: TreeDrafter, root: Root) -> GrownTree: ...


class TreeDrafter:
    """The draft head and its cache, and what growing any tree is made of."""

    def __init__(self, model: DraftModel, cache: PagedKvCache, max_position: int) -> None:
        self.model = model
        self.cache = cache
        self._last_position = max_position - 1

    def extend(
        self,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        first: torch.Tensor,
        count: torch.Tensor,
        start: torch.Tensor,
        block_tables: BlockTables,
    ) -> DraftHeads:
        """Writes a line of draft rows: token_ids `[batch, n]` at rows first … first + n - 1, `count` of them real.

        first, count, start int64 `[batch]`; hidden `[batch * n, hidden_size]` are the fused target states of the
        tokens before. Rows below `start` don't exist. Returns the last real row's state, n = 1.
        """
        batch, rows = token_ids.shape
        offsets = torch.arange(rows, device=token_ids.device)
        triangle = offsets[:, None] >= offsets
        keep = offsets < count[:, None]
        attention = PagedAttention.over(self.cache, block_tables, first, start, triangle[None], offsets[None], keep)
        normed, recurrent = self.model.forward(
            token_ids.reshape(-1), hidden, self._rope(first[:, None] + offsets), attention
        )
        last = (torch.arange(batch, device=token_ids.device) * rows + count - 1).clamp(min=0)
        return DraftHeads(normed.index_select(0, last)[:, None], recurrent.index_select(0, last)[:, None])

    def scores(self, root: Root, heads: DraftHeads, depth: int) -> torch.Tensor:
        """How likely each token of the draft vocabulary follows these nodes of one depth, float32 log-scores
        `[batch, n, draft_vocab]`; see `sampling.draft_scores`."""
        batch, n = heads.normed.shape[:2]
        logits = self.model.logits(heads.normed.flatten(0, 1)).float().view(batch, n, -1)
        positions = (root.position + depth + 1)[:, None].expand(-1, n)
        return draft_scores(logits, positions, self.model.target_token_ids, root.sampling, root.variant)

    def run(
        self,
        root: Root,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        depth: int,
        offsets: torch.Tensor,
        ancestors: torch.Tensor,
    ) -> DraftHeads:
        """Runs nodes of one depth through the draft head; their rows go to the root's + `offsets`.

        token_ids int64 `[batch, n]`; hidden `[batch, n, hidden_size]`, their parents' recurrent state; offsets int64
        `[1, n]`; ancestors bool `[batch or 1, n, rows]` over the root's row and those behind it.
        """
        batch, n = token_ids.shape
        attention = PagedAttention.over(
            self.cache, root.block_tables, root.position, root.start, ancestors, offsets, root.keep[:, None]
        )
        positions = self._rope((root.position + depth)[:, None].expand(-1, n))
        normed, recurrent = self.model.forward(token_ids.reshape(-1), hidden.flatten(0, 1), positions, attention)
        return DraftHeads(normed.view(batch, n, -1), recurrent.view(batch, n, -1))

    def _rope(self, rows: torch.Tensor) -> torch.Tensor:
        """RoPE positions of rows: the token position less one. Nodes beyond the model's limit are never emitted."""
        return (rows - 1).clamp(0, self._last_position).reshape(-1)
