"""Decode: a batch of requests that join and leave between iterations. The host's side of the iteration.

Synchronous; owned by one engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchline.config import EngineConfig
from branchline.core import DraftTree, FinishReason, InvalidRequestError, KvSpan, Request
from branchline.engine.blocks import OutOfBlocksError
from branchline.engine.draft import TreeDrafter
from branchline.engine.iteration import EXHAUSTED, RUNNING, STOPPED, DecodeIteration
from branchline.engine.models.protocol import KvGeometry, Models
from branchline.engine.sequence import KvCaches, check_token_ids, variant_for
from branchline.engine.state import BatchState
from branchline.engine.tree import TreeTopology

#: Tokens by which the context that attention reads grows at a time: few shapes, little waste.
CONTEXT_BUCKET = 128

_FINISH = {RUNNING: None, STOPPED: FinishReason.STOP, EXHAUSTED: FinishReason.LENGTH}


@dataclass(eq=False)
class Allocation:
    """A sequence's blocks and batch slot, from Reserve to the end; `length` is known to the host once it runs."""

    slot: int
    blocks: list[int]
    max_length: int
    request: Request | None = None
    length: int = 0
    drafted: int = 0
    released: bool = False

    @property
    def running(self) -> bool:
        return self.request is not None


@dataclass(frozen=True)
class StepResult:
    """What one iteration did for one request. `drafted` counts the draft nodes that it verified."""

    allocation: Allocation
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    drafted: int


class DecodeRunner:
    """Runs the batch on one device. Not thread-safe by design."""

    def __init__(self, models: Models, engine: EngineConfig, tree: TreeTopology) -> None:
        self._caches = KvCaches(models, engine, tree)
        self._vocab_size = models.target.spec.vocab_size
        self._tree = tree
        self._state = BatchState.empty(engine.max_batch, tree.num_nodes, models.device)
        drafter = None
        if models.draft is not None and self._caches.draft is not None:
            drafter = TreeDrafter(models.draft, self._caches.draft, tree, models.target.spec.max_position)
        self._iteration = DecodeIteration(models.target, self._caches.target, drafter, self._state, tree)
        width = self._caches.blocks_for(self._caches.max_model_len)
        self._block_tables = torch.zeros((engine.max_batch + 1, width), dtype=torch.int64, device=models.device)
        self._free_slots = list(range(engine.max_batch - 1, -1, -1))
        self._running: list[Allocation] = []
        self.max_batch = engine.max_batch
        self.max_model_len = self._caches.max_model_len
        self.pool = self._caches.pool

    @property
    def target_kv(self) -> KvGeometry:
        return self._caches.target_kv

    @property
    def draft_kv(self) -> KvGeometry | None:
        return self._caches.draft_kv

    @property
    def running(self) -> int:
        return len(self._running)

    def check_integrity(self) -> None:
        self.pool.check_integrity()
        slots = [allocation.slot for allocation in self._running]
        assert len(set(slots)) == len(slots), "two requests share a slot"
        assert not set(slots) & set(self._free_slots), "a running request's slot is free"

    def check(self, context_length: int, max_length: int) -> None:
        """Raises InvalidRequestError for a sequence that could never fit."""
        if not 0 < context_length < max_length:
            raise InvalidRequestError(f"a context of {context_length} tokens does not fit a sequence of {max_length}")
        if context_length >= self.max_model_len:
            raise InvalidRequestError(
                f"the context has {context_length} tokens; at most {self.max_model_len - 1} leave room for an answer"
            )

    def allocate(self, max_length: int) -> Allocation:
        """Promises a slot and the blocks of the worst case, so that a running request never lacks one.

        Raises OutOfBlocksError, and takes nothing, when either is short now.
        """
        if not self._free_slots:
            raise OutOfBlocksError(f"all {self.max_batch} batch slots are taken")
        max_length = min(max_length, self.max_model_len)
        blocks = self.pool.allocate(self._caches.blocks_for(max_length))
        slot = self._free_slots.pop()
        self._block_tables[slot].zero_()
        self._block_tables[slot, : len(blocks)] = self._block_tables.new_tensor(blocks)
        return Allocation(slot, blocks, max_length)

    def import_kv(self, allocation: Allocation, span: KvSpan, data: bytes) -> None:
        """Scatters a span's canonical bytes into the cache. Raises InvalidRequestError when it lies outside the
        allocation or carries the wrong number of bytes."""
        assert not allocation.released
        self._caches.load(allocation.blocks, span, data)

    def start(
        self, allocation: Allocation, request: Request, first_token: int, tree: DraftTree, has_draft_kv: bool
    ) -> None:
        """Joins the batch from the next step on. The target's KV of the whole context is in the cache; draft rows
        1 … context length too if `has_draft_kv`, else the drafter starts cold. The tree is cut to what fits this
        worker's own. Raises InvalidRequestError when the request doesn't fit the allocation."""
        assert not allocation.released
        assert not allocation.running
        context = len(request.context)
        remaining = min(request.max_length, allocation.max_length) - context - 1
        if remaining < 1:
            raise InvalidRequestError(f"{allocation.max_length} tokens are promised; a context of {context} fills them")
        check_token_ids((first_token, *tree.tokens), self._vocab_size)
        tree = self._fitting(tree)
        draft_start = 1 if has_draft_kv else context + 1
        self._state.load(allocation.slot, request, first_token, tree, draft_start, remaining)
        allocation.request, allocation.length, allocation.drafted = request, context, len(tree)
        self._running.append(allocation)

    def step(self) -> list[StepResult]:
        """One iteration over all running requests; those that finish have left the batch."""
        if not self._running:
            return []
        batch = list(self._running)
        slots = self._bucket([allocation.slot for allocation in batch])
        longest = max(allocation.length for allocation in batch) + self._caches.headroom
        width = min(
            -(-longest // CONTEXT_BUCKET) * -(-CONTEXT_BUCKET // self._caches.block_size), self._block_tables.shape[1]
        )
        variant = variant_for([allocation.request.sampling for allocation in batch if allocation.request])
        emission = self._iteration.run(slots, self._block_tables.index_select(0, slots)[:, :width], variant)
        token_ids, counts = emission.token_ids.tolist(), emission.count.tolist()
        finishes = emission.finish.tolist()
        results = []
        for allocation, tokens, count, finish in zip(batch, token_ids, counts, finishes, strict=False):
            results.append(StepResult(allocation, tuple(tokens[:count]), _FINISH[finish], allocation.drafted))
            allocation.length += count
            allocation.drafted = self._tree.num_nodes
            if finish != RUNNING:
                self._leave(allocation)
        return results

    def release(self, allocation: Allocation) -> None:
        """Leaves the batch if it is in it, and frees blocks and slot. Idempotent."""
        if allocation.released:
            return
        if allocation in self._running:
            self._leave(allocation)
        allocation.released = True
        self.pool.release(allocation.blocks)
        self._free_slots.append(allocation.slot)

    def _leave(self, allocation: Allocation) -> None:
        self._running.remove(allocation)
        self._state.clear(allocation.slot)

    def _bucket(self, slots: list[int]) -> torch.Tensor:
        """Pads the batch to a power of two with the state's padding row."""
        size = 1 << (len(slots) - 1).bit_length()
        padded = slots + [self.max_batch] * (size - len(slots))
        return torch.tensor(padded, dtype=torch.int64, device=self._block_tables.device)

    def _fitting(self, tree: DraftTree) -> DraftTree:
        """The part of a shipped tree that this worker's shapes can hold: the first nodes, down to its own depth."""
        kept: dict[int, int] = {0: 0}  # node number there -> here
        depth = {0: 0}
        entries: list[tuple[int, int, float]] = []
        for number, (token, parent, score) in enumerate(zip(tree.tokens, tree.parents, tree.scores, strict=True), 1):
            depth[number] = depth[parent] + 1
            if len(entries) == self._tree.num_nodes:
                break
            if depth[number] <= self._tree.depth:
                entries.append((token, kept[parent], score))
                kept[number] = len(entries)
        return DraftTree(*(tuple(column) for column in zip(*entries, strict=True))) if entries else DraftTree()
