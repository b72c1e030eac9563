"""Who holds which KV block. Pure bookkeeping: no tensors, one owner (the engine thread)."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

#: Block 0 belongs to nobody: padding and inactive slots read and write there.
NULL_BLOCK = 0


class OutOfBlocksError(RuntimeError):
    """No KV blocks, or no batch slot, are free now; a later try may succeed."""


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` cache rows take."""
    return -(-tokens // block_size)


class BlockPool:
    """The free ones of blocks 1 … total, and how many sequences hold each that is not free.

    Lowest numbers are handed out first, in ascending order, so that most of a sequence's blocks lie side by side: a
    CPU reads memory faster in order than in any other (`benchmarks/attention.py --blocks random` shows by how much).
    """

    def __init__(self, total: int) -> None:
        assert total >= 1, total
        self.total = total
        self._free = list(range(NULL_BLOCK + 1, total + 1))  # a heap
        self._holders: dict[int, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._holders)

    def can_allocate(self, count: int) -> bool:
        return count <= self.free

    def allocate(self, count: int) -> list[int]:
        """Raises OutOfBlocksError, and takes nothing, when fewer than `count` are free."""
        if not self.can_allocate(count):
            raise OutOfBlocksError(f"{count} KV blocks needed, {self.free} of {self.total} free")
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One more sequence holds these blocks; each holder releases them once."""
        for block in blocks:
            self._holders[block] += 1  # KeyError: not allocated

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self._holders[block] -= 1  # KeyError: freed too often, or never allocated
            if self._holders[block] == 0:
                del self._holders[block]
                heapq.heappush(self._free, block)

    def freed_by(self, sequences: Iterable[list[int]]) -> int:
        """Blocks that would be free if these holders released theirs."""
        counts = Counter(block for blocks in sequences for block in blocks)
        return sum(self._holders[block] == count for block, count in counts.items())

    def check_integrity(self) -> None:
        """Every block is free or held, none both, the null block neither."""
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert self._holders.keys().isdisjoint(self._free), "a block is both free and held"
        assert self._holders.keys() | set(self._free) == set(range(1, self.total + 1)), "a block is lost"
        assert min(self._holders.values(), default=1) >= 1, "a block is held by nobody"
