"""Who holds which KV block. Pure bookkeeping: no tensors, one owner (the engine thread)."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

#: Block 0 belongs to nobody: padding and inactive slots read and write there.
NULL_BLOCK = 0


class OutOfBlocksError(RuntimeError):
    """No KV blocks, or no batch slot, are free now; a later try may succeed."""


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` cache rows take."""
    return -(-tokens // block_size)


class BlockPool:
    """The blocks 1 … total. Each is held by one or more sequences, or free; of the free ones some are cached: what they
    hold is known by a key and may be taken again (`prefix_cache`), until the block is needed for something else.

    Empty blocks are handed out before cached ones, lowest numbers first and in ascending order, so that most of a
    sequence's blocks lie side by side: a CPU reads memory faster in order than in any other
    (`benchmarks/attention.py --blocks random` shows by how much). Cached ones go least recently used first. Whoever
    holds a block holds all that stand before it in its chain, and a release lets go of the last first; so a block is
    never evicted before those that can be reached only by way of it.
    """

    def __init__(self, total: int) -> None:
        assert total >= 1, total
        self.total = total
        self._empty = list(range(NULL_BLOCK + 1, total + 1))  # a heap
        self._holders: dict[int, int] = {}
        self._keys: dict[int, bytes] = {}  # of cached blocks, held or not
        self._blocks: dict[bytes, int] = {}  # the inverse
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached and free, the least recently used first

    @property
    def free(self) -> int:
        """Blocks that can be allocated, cached or empty."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        return len(self._holders)

    @property
    def cached(self) -> int:
        """Blocks that can be found by a key, held or free."""
        return len(self._keys)

    def can_allocate(self, count: int) -> bool:
        return count <= self.free

    def allocate(self, count: int) -> list[int]:
        """Raises OutOfBlocksError, and takes nothing, when fewer than `count` are free."""
        if not self.can_allocate(count):
            raise OutOfBlocksError(f"{count} KV blocks needed, {self.free} of {self.total} free")
        empty = min(count, len(self._empty))
        blocks = [heapq.heappop(self._empty) for _ in range(empty)]
        blocks += [self._evict() for _ in range(count - empty)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return sorted(blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more sequence holds these blocks; each holder releases them once."""
        for block in blocks:
            self._holders[block] += 1  # KeyError: not allocated

    def release(self, blocks: Sequence[int]) -> None:
        """`blocks` in a sequence's order."""
        for block in reversed(blocks):
            self._holders[block] -= 1  # KeyError: freed too often, or never allocated
            if self._holders[block] == 0:
                del self._holders[block]
                if block in self._keys:
                    self._idle[block] = None
                else:
                    heapq.heappush(self._empty, block)

    def remember(self, block: int, key: bytes) -> int:
        """From now on what a held block has in it is found by `key`. Returns the block that is: another one if that was
        remembered under this key before."""
        assert block in self._holders, f"block {block} is held by nobody"
        assert self._keys.get(block, key) == key, f"block {block} has another key already"
        known = self._blocks.setdefault(key, block)
        if known == block:
            self._keys[block] = key
        return known

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first keys, as far as all of them are known. Takes nothing."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, keys: Iterable[bytes]) -> list[int]:
        """As `find`; the caller holds them then, and releases them once."""
        found = self.find(keys)
        for block in found:
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
        return found

    def forget_free(self) -> None:
        """Evicts every cached block that nobody holds."""
        while self._idle:
            heapq.heappush(self._empty, self._evict())

    def freed_by(self, sequences: Iterable[list[int]]) -> int:
        """Blocks that would be free if these holders released theirs."""
        counts = Counter(block for blocks in sequences for block in blocks)
        return sum(self._holders[block] == count for block, count in counts.items())

    def held_without(self, blocks: Iterable[int], sequences: Iterable[list[int]]) -> int:
        """How many of `blocks` would still be held by somebody if these holders released theirs."""
        counts = Counter(block for released in sequences for block in released)
        return sum(self._holders.get(block, 0) > counts[block] for block in blocks)

    def check_integrity(self) -> None:
        """Every block is empty, cached and free, or held, none two of them, the null block none."""
        empty = set(self._empty)
        assert len(self._empty) == len(empty), "a block is free twice"
        assert empty.isdisjoint(self._idle), "a block is both empty and cached"
        assert self._holders.keys().isdisjoint(empty | self._idle.keys()), "a block is both free and held"
        assert self._holders.keys() | empty | self._idle.keys() == set(range(1, self.total + 1)), "a block is lost"
        assert min(self._holders.values(), default=1) >= 1, "a block is held by nobody"
        assert self._idle.keys() <= self._keys.keys(), "a block waits to be taken again, but has no key"
        assert empty.isdisjoint(self._keys), "an empty block has a key"
        assert {key: block for block, key in self._keys.items()} == self._blocks, "keys and blocks disagree"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._blocks[self._keys.pop(block)]
        return block
