"""Growing a draft tree with the draft head, level by level.

Draft row j holds the pair (target's hidden state at j - 1, token j), at RoPE position j - 1, in the draft cache's slot
for token position j. Rows up to the root are a line, rewritten from the accepted path; the nodes of the tree
being grown lie behind the root at root + node number, as they do in the target's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchline.engine.attention import PagedAttention
from branchline.engine.cache import PagedKvCache
from branchline.engine.models.protocol import DraftModel
from branchline.engine.sampling import SamplingTensors, SamplingVariant, draft_scores
from branchline.engine.tree import TreeTopology


@dataclass(frozen=True)
class _Level:
    """How one level of a static tree is grown; index tensors on the device.

    The level's inner nodes run through the draft head; each child then takes one of its parent's guesses.
    """

    nodes: torch.Tensor  # int64 [inner]: node numbers, relative cache rows
    source: torch.Tensor  # int64 [inner]: index of each one's parent among the level above's inner nodes
    ancestors: torch.Tensor  # bool [1, inner, nodes + 1]
    guesses: int  # the most that any of them needs
    children: torch.Tensor  # int64 [children]: index among the drafted nodes
    child_parent: torch.Tensor  # int64 [children]: index among `nodes`
    child_rank: torch.Tensor  # int64 [children]


@dataclass(frozen=True)
class DraftHeads:
    """What the last line row, or a level, hands to the next level: `[batch, n, hidden_size]` each."""

    normed: torch.Tensor
    recurrent: torch.Tensor


class TreeDrafter:
    """The draft head, its cache and the static tree that it grows."""

    def __init__(self, model: DraftModel, cache: PagedKvCache, tree: TreeTopology, max_position: int) -> None:
        assert tree.num_nodes > 0
        self.model = model
        self.cache = cache
        self.tree = tree
        self._last_position = max_position - 1
        device = cache.storage.device
        self._levels = [_plan_level(tree, depth, device) for depth in range(tree.depth)]

    def extend(
        self,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        first: torch.Tensor,
        count: torch.Tensor,
        start: torch.Tensor,
        block_table: torch.Tensor,
    ) -> DraftHeads:
        """Writes a line of draft rows: token_ids `[batch, n]` at rows first … first + n - 1, `count` of them real.

        first, count, start int64 `[batch]`; hidden `[batch * n, hidden_size]` are the fused target states of the
        tokens before. Rows below `start` don't exist. Returns the last real row's state, n = 1.
        """
        batch, rows = token_ids.shape
        offsets = torch.arange(rows, device=token_ids.device)
        triangle = offsets[:, None] >= offsets
        keep = offsets < count[:, None]
        attention = PagedAttention.over(self.cache, block_table, first, start, triangle[None], offsets[None], keep)
        normed, recurrent = self.model.forward(
            token_ids.reshape(-1), hidden, self._rope(first[:, None] + offsets), attention
        )
        last = (torch.arange(batch, device=token_ids.device) * rows + count - 1).clamp(min=0)
        return DraftHeads(normed.index_select(0, last)[:, None], recurrent.index_select(0, last)[:, None])

    def grow(
        self,
        heads: DraftHeads,
        root: torch.Tensor,
        start: torch.Tensor,
        keep: torch.Tensor,
        block_table: torch.Tensor,
        sampling: SamplingTensors,
        variant: SamplingVariant,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tree behind the root at token position `root` `[batch]`: tokens int64, scores float32 `[batch, nodes]`.

        `heads` is the root row's state; `keep` bool `[batch]` is false for slots whose rows must not be written.
        """
        batch, nodes = root.shape[0], self.tree.num_nodes
        tokens = torch.zeros((batch, nodes + 1), dtype=torch.int64, device=root.device)
        scores = torch.zeros((batch, nodes + 1), dtype=torch.float32, device=root.device)
        for depth, level in enumerate(self._levels):
            if depth > 0:
                heads = self._forward_level(level, depth, heads, tokens, root, start, keep, block_table)
            logits = self.model.logits(heads.normed.flatten(0, 1)).float().view(batch, len(level.nodes), -1)
            log_probabilities = torch.log_softmax(logits, -1)
            positions = (root + depth + 1)[:, None].expand(-1, len(level.nodes))
            ranking = draft_scores(log_probabilities, logits, positions, self.model.target_token_ids, sampling, variant)
            guesses = ranking.topk(level.guesses, -1).indices
            picked = guesses[:, level.child_parent, level.child_rank]
            gained = log_probabilities[:, level.child_parent].gather(2, picked[:, :, None])[:, :, 0]
            tokens.index_copy_(1, level.children + 1, self.model.target_token_ids[picked])
            above = scores.index_select(1, level.nodes.index_select(0, level.child_parent))
            scores.index_copy_(1, level.children + 1, above + gained)
        return tokens[:, 1:], scores[:, 1:]

    def _forward_level(
        self,
        level: _Level,
        depth: int,
        above: DraftHeads,
        tokens: torch.Tensor,
        root: torch.Tensor,
        start: torch.Tensor,
        keep: torch.Tensor,
        block_table: torch.Tensor,
    ) -> DraftHeads:
        """Runs a level's inner nodes through the draft head; their rows go to root + node number."""
        batch, inner = root.shape[0], len(level.nodes)
        hidden = above.recurrent.index_select(1, level.source)
        attention = PagedAttention.over(
            self.cache, block_table, root, start, level.ancestors, level.nodes[None], keep[:, None]
        )
        positions = self._rope((root + depth)[:, None].expand(-1, inner))
        normed, recurrent = self.model.forward(
            tokens.index_select(1, level.nodes).reshape(-1), hidden.flatten(0, 1), positions, attention
        )
        return DraftHeads(normed.view(batch, inner, -1), recurrent.view(batch, inner, -1))

    def _rope(self, rows: torch.Tensor) -> torch.Tensor:
        """RoPE positions of rows: the token position less one. Nodes beyond the model's limit are never emitted."""
        return (rows - 1).clamp(0, self._last_position).reshape(-1)


def _plan_level(tree: TreeTopology, depth: int, device: torch.device) -> _Level:
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
        children=tensor([child - 1 for child in children]),
        child_parent=tensor([inner.index(parents[child]) for child in children]),
        child_rank=tensor([tree.choices[child - 1][-1] for child in children]),
    )
