"""Who holds which batch slot and which blocks in the decode worker, and who has to give them back.

A sequence gets the blocks of its context first and more as it grows. When none are left, the live allocation of the
largest rank is preempted; the smallest rank is never preempted for another, so somebody always gets on.

What a sequence leaves behind is kept for those that begin alike, until its blocks are needed: whole blocks whose rows
are complete, of the context once it is there, and of what was generated once the sequence is released.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from branchline.engine.allocation import Allocation
from branchline.engine.blocks import OutOfBlocksError
from branchline.engine.cache import slots_of
from branchline.engine.prefix_cache import PrefixCache
from branchline.engine.sequence import KvCaches


class Allocations:
    """All allocations of a decode worker. `lead`: tokens by which a sequence may be longer than the host knows."""

    def __init__(self, caches: KvCaches, prefix: PrefixCache, slots: int, lead: int, device: torch.device) -> None:
        self._caches = caches
        self._prefix = prefix
        self._pool = caches.pool
        self._lead = lead
        self._slots = slots
        self._free_slots = list(range(slots - 1, -1, -1))
        width = caches.blocks_for(caches.max_model_len + lead)
        #: int64 `[slots + 1, width]`: block ids by slot, the null block where there is none; the last row is padding.
        self.block_tables = torch.zeros((slots + 1, width), dtype=torch.int64, device=device)
        self.live: list[Allocation] = []

    def check_integrity(self) -> None:
        self._pool.check_integrity()
        slots = [allocation.slot for allocation in self.live]
        assert len(set(slots)) == len(slots), "two allocations share a slot"
        assert sorted(slots + self._free_slots) == list(range(self._slots)), "a slot is lost"
        held = {block for allocation in self.live for block in allocation.blocks}
        assert len(held) == self._pool.used, "a block is held by no live allocation"

    def could_fit(self, context_length: int, samples: int) -> bool:
        """Whether all of it would fit if nothing else were there."""
        return samples <= self._slots and self._blocks(context_length, samples) <= self._pool.total

    def can_allocate(
        self,
        context_length: int,
        samples: int,
        without: Collection[Allocation] = (),
        keys: Sequence[bytes] | None = None,
    ) -> bool:
        """Whether it fits now, or would `without` some of the live ones, leaving a block for each live sequence to
        grow, lest it is preempted at once."""
        staying = len(self.live) - len(without)
        free = self._pool.free + self._pool.freed_by(allocation.blocks for allocation in without)
        # Blocks that are found cost nothing where somebody who stays holds them anyway; else they are among the free.
        found = self._prefix.find(keys or (), context_length)
        needed = self._blocks(context_length, samples) - self._pool.held_without(
            found, [allocation.blocks for allocation in without]
        )
        return samples <= self._slots - staying and needed + staying <= free

    def allocate(
        self,
        context_length: int,
        max_length: int,
        samples: int,
        rank: float,
        priority: int,
        keys: tuple[bytes, ...] | None = None,
    ) -> list[Allocation]:
        """Blocks from the front that are known by `keys` are taken over and held. Raises OutOfBlocksError, and takes
        nothing, when slots or blocks are short."""
        if samples > len(self._free_slots):
            raise OutOfBlocksError(f"{samples} batch slots needed, {len(self._free_slots)} of {self._slots} free")
        found = self._prefix.take(keys or (), context_length)
        try:
            blocks = found + self._pool.allocate(self._blocks(context_length, samples) - len(found))
        except OutOfBlocksError:
            self._pool.release(found)
            raise
        full = blocks[: context_length // self._caches.block_size]
        tail = (len(blocks) - len(full)) // samples
        held = len(found) * self._caches.block_size
        group: list[Allocation] = []
        for sample in range(samples):
            own = blocks[len(full) + sample * tail :][:tail]
            if sample > 0:
                self._pool.share(full)
            allocation = Allocation(self._free_slots.pop(), [], context_length, max_length, rank, priority, group)
            allocation.keys, allocation.held, allocation.complete = keys, held, held
            allocation.known = len(found)
            self.block_tables[allocation.slot].zero_()
            self._append(allocation, full + own)
            group.append(allocation)
        if samples == 1:
            group[0].shared = True
        self.live += group
        return group

    def share_context(self, group: list[Allocation], drafts: bool) -> None:
        """Copies the rows behind the context's full blocks from the first of a group to the others, and makes the full
        blocks known. `drafts`: all draft rows in front of the context's end are there, or nobody drafts here."""
        first = group[0]
        assert not first.released
        assert not first.running
        context, size = first.context_length, self._caches.block_size
        positions = torch.arange(context - context % size, context, device=self.block_tables.device)[None]
        for other in group[1:]:
            if not other.released and positions.numel() > 0:
                source = slots_of(self.block_tables[first.slot][None], positions, size)
                target = slots_of(self.block_tables[other.slot][None], positions, size)
                for cache in filter(None, (self._caches.target, self._caches.draft)):
                    cache.move(source, target)
        for allocation in group:
            allocation.arrived(drafts)
            if not allocation.released:
                self._remember(allocation)

    def grow(self, running: list[Allocation]) -> list[Allocation]:
        """Gives each running sequence the blocks that the next iteration may write to, the smallest rank first. Returns
        those that must be released, in this order, for want of blocks; their blocks are back in the pool already."""
        preempted: list[Allocation] = []
        for allocation in sorted(running, key=_order):
            needed = self._caches.blocks_for(allocation.length + self._lead) - len(allocation.blocks)
            while needed > 0 and not allocation.released:
                if self._pool.can_allocate(needed):
                    self._append(allocation, self._pool.allocate(needed))
                    break
                preempted += self._preempt()
        return preempted

    def release(self, allocation: Allocation) -> None:
        """Frees blocks and slot. Idempotent."""
        if allocation.released:
            return
        allocation.released = True
        self._remember(allocation)
        self.live.remove(allocation)
        self._pool.release(allocation.blocks)
        self._free_slots.append(allocation.slot)

    def _preempt(self) -> list[Allocation]:
        """Releases the allocation of the largest rank. A group whose context isn't shared yet goes as a whole: its
        other samples would wait for a context that never comes."""
        last = max(self.live, key=_order)
        victims = [last] if last.shared else [allocation for allocation in last.group if not allocation.released]
        for victim in victims:
            self.release(victim)
        return victims

    def _remember(self, allocation: Allocation) -> None:
        """Makes complete blocks known. Where others with the same content are known already, it goes on with those;
        so no iteration may be running that reads its block table, unless it is released."""
        first, whole = allocation.known, allocation.complete // self._caches.block_size
        if allocation.keys is None or whole <= first:
            return
        if whole > len(allocation.keys):
            allocation.keys = self._prefix.longer(allocation.keys, allocation.token_ids)
        own = allocation.blocks[first:whole]
        known = self._prefix.remember(own, allocation.keys[first:whole], None)
        if known != own:
            allocation.blocks[first:whole] = known
            self.block_tables[allocation.slot, first:whole] = self.block_tables.new_tensor(known)
        allocation.known = whole

    def _append(self, allocation: Allocation, blocks: list[int]) -> None:
        start = len(allocation.blocks)
        self.block_tables[allocation.slot, start : start + len(blocks)] = self.block_tables.new_tensor(blocks)
        allocation.blocks += blocks

    def _blocks(self, context_length: int, samples: int) -> int:
        """Blocks that `samples` sequences with one context take: those that the context fills once, the others each."""
        full = context_length // self._caches.block_size
        return full + samples * (self._caches.blocks_for(context_length + self._lead) - full)


def _order(allocation: Allocation) -> tuple[float, int]:
    """By rank; the slot only makes it a total order."""
    return allocation.rank, allocation.slot
