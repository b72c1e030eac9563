"""One decode iteration: verify, accept, rewind, draft (docs/architecture.md, section 4; docs/engine.md).

Everything here has static shapes and reads nothing back to the host: no `.item()`, no boolean indexing, no Python
number that changes between iterations. A batch bucket, a block-table width and a sampling variant fix all shapes, so
that one trace or one CUDA graph serves every iteration of that kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from branchline.engine.attention import PagedAttention
from branchline.engine.cache import BlockTables, PagedKvCache, null_unless, slots_of
from branchline.engine.draft import Root, TreeDrafter
from branchline.engine.growing import grower_for
from branchline.engine.models.protocol import TargetModel
from branchline.engine.sampling import SamplingVariant, choose_token, token_logprobs
from branchline.engine.state import ABSENT, BatchState
from branchline.engine.tree import TreeTopology, topology_tensors

RUNNING, STOPPED, EXHAUSTED = 0, 1, 2


@dataclass(frozen=True)
class Emission:
    """What an iteration emits, on the device: the first `count` of `token_ids` per row.

    token_ids int64 `[batch, depth + 1]`; count int64 `[batch]`, 0 for inactive rows; finish int64 `[batch]`: RUNNING,
    STOPPED at a stop token, or EXHAUSTED (max_tokens or the context limit); path as in Accepted. logprobs, if the
    variant has them: as `sampling.token_logprobs` gives them, one for each of `token_ids`.
    """

    token_ids: torch.Tensor
    count: torch.Tensor
    finish: torch.Tensor
    path: torch.Tensor
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.token_ids, self.count, self.finish, self.path, *(self.logprobs or ()))


@dataclass(frozen=True)
class Verified:
    """tokens, parents int64 `[batch, nodes]`, the root's included; logits `[batch, nodes, vocab]`; auxiliary `[batch,
    nodes, …]`, the hidden states that the draft head takes, or None."""

    tokens: torch.Tensor
    parents: torch.Tensor
    logits: torch.Tensor
    auxiliary: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.tokens, self.parents, self.logits, *(() if self.auxiliary is None else (self.auxiliary,)))


@dataclass(frozen=True)
class Accepted:
    """path int64 `[batch, depth + 1]`: node numbers from the root on, the last repeated as padding; token_ids int64, as
    long: the target's choice at each; length int64 `[batch]` counts the real entries, the root included."""

    path: torch.Tensor
    token_ids: torch.Tensor
    length: torch.Tensor


class DecodeIteration:
    """The iteration for trees of one budget: over a batch state, a target cache and (with a tree) a drafter."""

    def __init__(
        self,
        target: TargetModel,
        cache: PagedKvCache,
        drafter: TreeDrafter | None,
        state: BatchState,
        tree: TreeTopology,
    ) -> None:
        assert drafter is not None or tree.num_nodes == 0
        self.target = target
        self.cache = cache
        self.state = state
        self.depth = tree.depth
        #: Called with a phase's name when it is done, for benchmarks. On CUDA that is when it is launched.
        self.observe: Callable[[str], None] = _nobody
        self.nodes = tree.num_nodes
        self._drafter = drafter
        device = cache.storage.device
        self._grower = grower_for(tree, device)
        self._node = torch.arange(tree.num_nodes + 1, device=device)
        self._step = torch.arange(tree.depth + 1, device=device)

    def run(self, slots: torch.Tensor, block_tables: BlockTables, variant: SamplingVariant) -> Emission:
        """The whole iteration.

        slots int64 `[batch]`: rows of the state. The block tables are wide enough for each row's length, an accepted
        path and a tree behind it.
        """
        rows = self.state.select(slots, self.nodes, variant)
        return self._advance(slots, rows, self._verify(rows, block_tables), block_tables, variant)

    def verify(self, slots: torch.Tensor, block_tables: BlockTables) -> Verified:
        """The first half: one target forward over every node."""
        return self._verify(self.state.select(slots, self.nodes, SamplingVariant()), block_tables)

    def trees(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The trees that will be verified: tokens and parents int64 `[batch, nodes]`, the root's included."""
        return _with_root(self.state.select(slots, self.nodes, SamplingVariant()))

    def advance(
        self,
        slots: torch.Tensor,
        block_tables: BlockTables,
        verified: Verified,
        variant: SamplingVariant,
        allowed: torch.Tensor,
    ) -> Emission:
        """The second half. `allowed` bool `[batch, nodes, vocab]`: which tokens may be chosen at each node; what the
        host works out while the first half runs."""
        logits = verified.logits.masked_fill(~allowed, float("-inf"))
        verified = dataclasses.replace(verified, logits=logits)
        rows = self.state.select(slots, self.nodes, variant)
        return self._advance(slots, rows, verified, block_tables, variant)

    def _advance(
        self,
        slots: torch.Tensor,
        rows: BatchState,
        verified: Verified,
        block_tables: BlockTables,
        variant: SamplingVariant,
    ) -> Emission:
        accepted = self._accept(rows, verified, variant)
        emission = self._emit(rows, verified, accepted, variant)
        length = torch.where(rows.active, rows.length + accepted.length, rows.length)
        root = accepted.token_ids.gather(1, accepted.length[:, None] - 1)[:, 0]
        self.observe("accept")
        self._rewind(rows, accepted, block_tables)
        self.observe("rewind")
        if self._grower is not None:
            self._draft(slots, rows, verified, accepted, length, block_tables, variant)
        else:
            # Draft rows that nobody writes: whoever drafts again begins behind them.
            self.state.draft_start.index_copy_(0, slots, torch.where(rows.active, length + 1, rows.draft_start))
        # What an iteration with more nodes has left there is no part of this tree.
        self.state.tree_parents[:, self.nodes :].index_fill_(0, slots, ABSENT)
        self.state.length.index_copy_(0, slots, length)
        self.state.root.index_copy_(0, slots, root)
        self.state.remaining.index_copy_(0, slots, rows.remaining - emission.count)
        self.state.active.index_copy_(0, slots, rows.active & (emission.finish == RUNNING))
        if variant.edits:
            self.state.sampling.store(slots, rows.sampling)
        self.observe("draft")
        return emission

    def _verify(self, rows: BatchState, block_tables: BlockTables) -> Verified:
        """One target forward over every node: positions by depth, slots by node number, attention by ancestry."""
        batch, nodes = rows.root.shape[0], len(self._node)
        tokens, parents = _with_root(rows)
        depths, ancestors = topology_tensors(parents, self.depth)
        positions = (rows.length[:, None] + depths).clamp(max=self.target.spec.max_position - 1)
        no_start = torch.zeros_like(rows.length)
        attention = PagedAttention.over(
            self.cache,
            block_tables,
            rows.length,
            no_start,
            ancestors,
            self._node[None],
            rows.active[:, None],
            depths=depths,
        )
        output = self.target.forward(tokens.reshape(-1), positions.reshape(-1), attention)
        logits = self.target.logits(output.hidden).view(batch, nodes, -1)
        auxiliary = None if output.auxiliary is None else output.auxiliary.view(batch, nodes, -1)
        self.observe("verify")
        return Verified(tokens, parents, logits, auxiliary)

    def _accept(self, rows: BatchState, verified: Verified, variant: SamplingVariant) -> Accepted:
        """Walks from the root: chooses the target's token at the node, goes to the child that holds it, while there is
        one. Only the nodes on the way choose, so each can look back on the tokens before it (penalties, bad words)."""
        batch, nodes, vocab = verified.logits.shape
        flat = verified.logits.view(-1, vocab)
        first = torch.arange(batch, device=flat.device) * nodes
        node = torch.zeros_like(first)
        going = rows.active
        path, token_ids, length = [], [], torch.zeros_like(first)
        for step in range(self.depth + 1):
            chosen = choose_token(flat.index_select(0, first + node), rows.length + 1 + step, rows.sampling, variant)
            path.append(node)
            token_ids.append(chosen)
            length = length + going
            if variant.edits:
                rows.sampling.advance(chosen, going)
            if step < self.depth:
                match = (verified.parents == node[:, None]) & (verified.tokens == chosen[:, None])
                going = going & match.any(1)
                node = torch.where(going, match.int().argmax(1), node)
        return Accepted(torch.stack(path, 1), torch.stack(token_ids, 1), length.clamp(min=1))

    def _emit(self, rows: BatchState, verified: Verified, accepted: Accepted, variant: SamplingVariant) -> Emission:
        """The tokens chosen along the path (each accepted one was chosen by its parent; the last is the bonus), cut
        at the first stop token and at the tokens that remain."""
        token_ids = accepted.token_ids
        stops = (token_ids[:, :, None] == rows.stop_token_ids[:, None, :]).any(2)
        stops = stops & (self._step < torch.minimum(accepted.length, rows.remaining)[:, None])
        until_stop = torch.where(stops, self._step + 1, self.depth + 2).amin(1)
        count = torch.minimum(torch.minimum(accepted.length, rows.remaining), until_stop)
        exhausted = torch.where(count == rows.remaining, EXHAUSTED, RUNNING)
        finish = torch.where(stops.any(1), STOPPED, exhausted)
        logprobs = None
        if variant.logprobs:
            index = accepted.path[:, :, None].expand(-1, -1, verified.logits.shape[2])
            logprobs = token_logprobs(verified.logits.gather(1, index), token_ids)
        return Emission(token_ids, torch.where(rows.active, count, 0), finish, accepted.path, logprobs)

    def _rewind(self, rows: BatchState, accepted: Accepted, block_tables: BlockTables) -> None:
        """Moves the accepted nodes' rows right behind the context. A path is scattered over the tree's slots, so
        a count alone could not say which rows stay. The root's row is in its place already."""
        if self.depth == 0:
            return
        size = self.cache.block_size
        step = self._step[1:]
        keep = (step < accepted.length[:, None]) & rows.active[:, None]
        source = slots_of(block_tables.ids, rows.length[:, None] + accepted.path[:, 1:], size)
        target = slots_of(block_tables.ids, rows.length[:, None] + step, size)
        self.cache.move(source, null_unless(keep, target))

    def _draft(
        self,
        slots: torch.Tensor,
        rows: BatchState,
        verified: Verified,
        accepted: Accepted,
        length: torch.Tensor,
        block_tables: BlockTables,
        variant: SamplingVariant,
    ) -> None:
        """Rewrites the draft rows of the accepted path from the target's states, then grows the next tree."""
        assert self._drafter is not None
        assert self._grower is not None
        assert verified.auxiliary is not None
        index = accepted.path[:, :, None].expand(-1, -1, verified.auxiliary.shape[2])
        hidden = self._drafter.model.fuse(verified.auxiliary.gather(1, index).flatten(0, 1))
        count = torch.where(rows.active, accepted.length, 0)
        heads = self._drafter.extend(accepted.token_ids, hidden, rows.length + 1, count, rows.draft_start, block_tables)
        root = Root(heads, length, rows.draft_start, rows.active, block_tables, rows.sampling, variant)
        tree = self._grower.grow(self._drafter, root)
        parents = torch.where(self._node[:-1] < rows.budget[:, None], tree.parents, ABSENT)
        self.state.tree_tokens[:, : self.nodes].index_copy_(0, slots, tree.tokens)
        self.state.tree_parents[:, : self.nodes].index_copy_(0, slots, parents)
        self.state.tree_scores[:, : self.nodes].index_copy_(0, slots, tree.scores)


def _with_root(rows: BatchState) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.cat([rows.root[:, None], rows.tree_tokens], 1)
    return tokens, torch.cat([torch.full_like(rows.root, ABSENT)[:, None], rows.tree_parents], 1)


def _nobody(_: str) -> None:
    pass
