"""One decode iteration: verify, accept, rewind, draft (docs/architecture.md, section 4; docs/engine.md).

Everything here has static shapes and reads nothing back to the host: no `.item()`, no boolean indexing, no Python
number that changes between iterations. A batch bucket and a block-table width fix all shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchline.engine.attention import PagedAttention
from branchline.engine.cache import PagedKvCache, null_unless, slots_of
from branchline.engine.draft import TreeDrafter
from branchline.engine.models.protocol import TargetModel
from branchline.engine.sampling import SamplingVariant, choose_tokens
from branchline.engine.state import ABSENT, BatchState
from branchline.engine.tree import TreeTopology, topology_tensors

RUNNING, STOPPED, EXHAUSTED = 0, 1, 2


@dataclass(frozen=True)
class Emission:
    """What an iteration emits, on the device: the first `count` of `token_ids` per row.

    token_ids int64 `[batch, depth + 1]`; count int64 `[batch]`, 0 for inactive rows; finish int64 `[batch]`: RUNNING,
    STOPPED at a stop token, or EXHAUSTED (max_tokens or the context limit).
    """

    token_ids: torch.Tensor
    count: torch.Tensor
    finish: torch.Tensor


@dataclass(frozen=True)
class _Verified:
    """chosen int64 `[batch, nodes]`: the target's own token at each node; auxiliary `[batch, nodes, …]` or None."""

    tokens: torch.Tensor
    parents: torch.Tensor
    chosen: torch.Tensor
    auxiliary: torch.Tensor | None


@dataclass(frozen=True)
class _Accepted:
    """path int64 `[batch, depth + 1]`: node numbers from the root on, the last repeated as padding; length int64
    `[batch]` counts its real entries, the root included."""

    path: torch.Tensor
    length: torch.Tensor


class DecodeIteration:
    """The iteration over a batch state, a target cache and (with a tree) a drafter. `nodes` counts the root too."""

    def __init__(
        self,
        target: TargetModel,
        cache: PagedKvCache,
        drafter: TreeDrafter | None,
        state: BatchState,
        tree: TreeTopology,
    ) -> None:
        assert (drafter is None) == (tree.num_nodes == 0)
        self.target = target
        self.cache = cache
        self.drafter = drafter
        self.state = state
        self.depth = tree.depth
        device = cache.storage.device
        self._tree_parents = torch.tensor(tree.parents, dtype=torch.int64, device=device)
        self._node = torch.arange(tree.num_nodes + 1, device=device)
        self._step = torch.arange(tree.depth + 1, device=device)

    @torch.inference_mode()
    def run(self, slots: torch.Tensor, block_table: torch.Tensor, variant: SamplingVariant) -> Emission:
        """slots int64 `[batch]`: rows of the state; block_table int64 `[batch, width]`, wide enough for each row's
        length, an accepted path and a tree behind it."""
        rows = self.state.select(slots)
        verified = self._verify(rows, block_table, variant)
        accepted = self._accept(verified)
        emission = self._emit(rows, verified, accepted)
        self._rewind(rows, accepted, block_table)
        length = torch.where(rows.active, rows.length + accepted.length, rows.length)
        root = verified.chosen.gather(1, accepted.path[:, -1:])[:, 0]
        if self.drafter is not None:
            tokens = self._draft(rows, verified, accepted, length, block_table, variant)
            self.state.tree_tokens.index_copy_(0, slots, tokens)
            self.state.tree_parents.index_copy_(0, slots, self._tree_parents.expand(slots.shape[0], -1))
        self.state.length.index_copy_(0, slots, length)
        self.state.root.index_copy_(0, slots, root)
        self.state.remaining.index_copy_(0, slots, rows.remaining - emission.count)
        self.state.active.index_copy_(0, slots, rows.active & (emission.finish == RUNNING))
        return emission

    def _verify(self, rows: BatchState, block_table: torch.Tensor, variant: SamplingVariant) -> _Verified:
        """One target forward over every node: positions by depth, slots by node number, attention by ancestry."""
        batch, nodes = rows.root.shape[0], len(self._node)
        tokens = torch.cat([rows.root[:, None], rows.tree_tokens], 1)
        parents = torch.cat([torch.full_like(rows.root, ABSENT)[:, None], rows.tree_parents], 1)
        depths, ancestors = topology_tensors(parents, self.depth)
        positions = (rows.length[:, None] + depths).clamp(max=self.target.spec.max_position - 1)
        no_start = torch.zeros_like(rows.length)
        attention = PagedAttention.over(
            self.cache, block_table, rows.length, no_start, ancestors, self._node[None], rows.active[:, None]
        )
        output = self.target.forward(tokens.reshape(-1), positions.reshape(-1), attention)
        logits = self.target.logits(output.hidden).view(batch, nodes, -1)
        chosen = choose_tokens(logits, depths, rows.length + 1, self.depth + 1, rows.sampling, variant)
        auxiliary = None if output.auxiliary is None else output.auxiliary.view(batch, nodes, -1)
        return _Verified(tokens, parents, chosen, auxiliary)

    def _accept(self, verified: _Verified) -> _Accepted:
        """Walks from the root into the child that holds the target's own token, while there is one."""
        node = torch.zeros_like(verified.tokens[:, :1])
        going = torch.ones_like(node, dtype=torch.bool)
        path, length = [node], torch.ones_like(node)
        for _ in range(self.depth):
            wanted = verified.chosen.gather(1, node)
            match = (verified.parents == node) & (verified.tokens == wanted)
            going = going & match.any(1, keepdim=True)
            node = torch.where(going, match.int().argmax(1, keepdim=True), node)
            length = length + going
            path.append(node)
        return _Accepted(torch.cat(path, 1), length[:, 0])

    def _emit(self, rows: BatchState, verified: _Verified, accepted: _Accepted) -> Emission:
        """The tokens chosen along the path (each accepted one was chosen by its parent; the last is the bonus), cut
        at the first stop token and at the tokens that remain."""
        token_ids = verified.chosen.gather(1, accepted.path)
        stops = (token_ids[:, :, None] == rows.stop_token_ids[:, None, :]).any(2)
        stops = stops & (self._step < torch.minimum(accepted.length, rows.remaining)[:, None])
        until_stop = torch.where(stops, self._step + 1, self.depth + 2).amin(1)
        count = torch.minimum(torch.minimum(accepted.length, rows.remaining), until_stop)
        exhausted = torch.where(count == rows.remaining, EXHAUSTED, RUNNING)
        finish = torch.where(stops.any(1), STOPPED, exhausted)
        return Emission(token_ids, torch.where(rows.active, count, 0), finish)

    def _rewind(self, rows: BatchState, accepted: _Accepted, block_table: torch.Tensor) -> None:
        """Moves the accepted nodes' rows right behind the context. A path is scattered over the tree's slots, so
        a count alone could not say which rows stay."""
        size = self.cache.block_size
        keep = (self._step < accepted.length[:, None]) & rows.active[:, None]
        source = slots_of(block_table, rows.length[:, None] + accepted.path, size)
        target = slots_of(block_table, rows.length[:, None] + self._step, size)
        self.cache.move(source.reshape(-1), null_unless(keep, target).reshape(-1))

    def _draft(
        self,
        rows: BatchState,
        verified: _Verified,
        accepted: _Accepted,
        length: torch.Tensor,
        block_table: torch.Tensor,
        variant: SamplingVariant,
    ) -> torch.Tensor:
        """Rewrites the draft rows of the accepted path from the target's states, then grows the next tree."""
        assert self.drafter is not None
        assert verified.auxiliary is not None
        index = accepted.path[:, :, None].expand(-1, -1, verified.auxiliary.shape[2])
        hidden = self.drafter.model.fuse(verified.auxiliary.gather(1, index).flatten(0, 1))
        token_ids = verified.chosen.gather(1, accepted.path)
        count = torch.where(rows.active, accepted.length, 0)
        heads = self.drafter.extend(token_ids, hidden, rows.length + 1, count, rows.draft_start, block_table)
        tokens, _ = self.drafter.grow(heads, length, rows.draft_start, rows.active, block_table, rows.sampling, variant)
        return tokens
