"""The running batch on the device: one row per slot, read and written by the decode iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchline.core import MAX_STOP_TOKEN_IDS, DraftTree, Request
from branchline.engine.sampling import SamplingTensors, SamplingVariant

#: Stands for "no node" among parents and "no token" among stop ids; equals no node number and no token id.
ABSENT = -1


@dataclass(frozen=True)
class Start:
    """How a request joins the batch. `tree` has at most `budget` nodes; `remaining` tokens may be emitted after
    `first_token`; draft rows exist from `draft_start` on."""

    request: Request
    first_token: int
    tree: DraftTree
    budget: int
    draft_start: int
    remaining: int


@dataclass
class BatchState:
    """Tensors `[slots + 1, …]` on one device. The last row is padding: never active, it fills up a batch bucket.

    `length` counts the tokens whose target KV is in the cache; the root stands at that position. `draft_start` is the
    first draft row that exists. `remaining` tokens may still be emitted. `budget` nodes may be drafted; the columns of
    a tree from there on stay ABSENT.
    """

    length: torch.Tensor  # int64
    root: torch.Tensor  # int64: token id of node 0
    tree_tokens: torch.Tensor  # int64 [slots + 1, nodes]
    tree_parents: torch.Tensor  # int64 [slots + 1, nodes]: node numbers, ABSENT where there is no node
    tree_scores: torch.Tensor  # float32 [slots + 1, nodes]: cumulative draft log-probabilities, for whoever looks on
    budget: torch.Tensor  # int64
    draft_start: torch.Tensor  # int64
    remaining: torch.Tensor  # int64
    stop_token_ids: torch.Tensor  # int64 [slots + 1, MAX_STOP_TOKEN_IDS]
    active: torch.Tensor  # bool
    sampling: SamplingTensors

    @classmethod
    def empty(cls, slots: int, nodes: int, vocab_size: int, device: torch.device) -> BatchState:
        def full(value: int, *shape: int) -> torch.Tensor:
            return torch.full((slots + 1, *shape), value, dtype=torch.int64, device=device)

        return cls(
            length=full(0),
            root=full(0),
            tree_tokens=full(0, nodes),
            tree_parents=full(ABSENT, nodes),
            tree_scores=torch.zeros((slots + 1, nodes), dtype=torch.float32, device=device),
            budget=full(0),
            draft_start=full(1),
            remaining=full(0),
            stop_token_ids=full(ABSENT, MAX_STOP_TOKEN_IDS),
            active=torch.zeros(slots + 1, dtype=torch.bool, device=device),
            sampling=SamplingTensors.empty(slots + 1, vocab_size, device),
        )

    def select(self, slots: torch.Tensor, nodes: int, variant: SamplingVariant) -> BatchState:
        """The rows of a batch, `[batch, …]` each, with the first `nodes` columns of their trees."""
        return BatchState(
            length=self.length.index_select(0, slots),
            root=self.root.index_select(0, slots),
            tree_tokens=self.tree_tokens[:, :nodes].index_select(0, slots),
            tree_parents=self.tree_parents[:, :nodes].index_select(0, slots),
            tree_scores=self.tree_scores[:, :nodes].index_select(0, slots),
            budget=self.budget.index_select(0, slots),
            draft_start=self.draft_start.index_select(0, slots),
            remaining=self.remaining.index_select(0, slots),
            stop_token_ids=self.stop_token_ids.index_select(0, slots),
            active=self.active.index_select(0, slots),
            sampling=self.sampling.select(slots, variant),
        )

    def load(self, slot: int, start: Start) -> None:
        """Fills a slot from the host, between iterations."""
        request, tree, nodes = start.request, start.tree, self.tree_tokens.shape[1]
        assert len(tree) <= start.budget <= nodes, (len(tree), start.budget, nodes)
        padding = nodes - len(tree)
        stop = [*request.stop_token_ids, *[ABSENT] * (MAX_STOP_TOKEN_IDS - len(request.stop_token_ids))]
        self.length[slot] = len(request.context)
        self.root[slot] = start.first_token
        self.tree_tokens[slot] = self.tree_tokens.new_tensor([*tree.tokens, *[0] * padding])
        self.tree_parents[slot] = self.tree_parents.new_tensor([*tree.parents, *[ABSENT] * padding])
        self.tree_scores[slot] = self.tree_scores.new_tensor([*tree.scores, *[0.0] * padding])
        self.budget[slot] = start.budget
        self.draft_start[slot] = start.draft_start
        self.remaining[slot] = start.remaining
        self.stop_token_ids[slot] = self.stop_token_ids.new_tensor(stop)
        self.sampling.load(slot, request, start.first_token)
        self.active[slot] = True

    def tree(self, slot: int) -> DraftTree:
        """The tree that the slot's next iteration verifies, read back to the host: between iterations only."""
        columns = (self.tree_tokens, self.tree_parents, self.tree_scores)
        nodes = int((self.tree_parents[slot] != ABSENT).sum())
        return DraftTree(*(tuple(column[slot, :nodes].tolist()) for column in columns))

    def clear(self, slot: int) -> None:
        self.active[slot] = False
