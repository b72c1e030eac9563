"""Which blocks of recent contexts a worker should still have in its prefix cache, as far as a gateway can know."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from gateway.worker import Worker

#: The weight of the latest observation in `trust`.
_LATEST = 0.1


class KnownBlocks:
    """One worker's, by their keys, in the order in which it would evict them: the least recently used chain first, from
    its end. So whenever a block is known, all in front of it are.

    `trust`, from 0 to 1: what share of the tokens that were expected here turned out to be here, lately. It falls where
    the worker evicts sooner than is thought, or caches nothing.
    """

    def __init__(self, incarnation: str, capacity: int) -> None:
        assert capacity >= 1, capacity
        self.incarnation = incarnation
        self.capacity = capacity
        self.trust = 1.0
        self._keys: OrderedDict[int, None] = OrderedDict()  # the next to go first

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, keys: Sequence[int]) -> int:
        """How many of the first keys are known."""
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def add(self, keys: Sequence[int]) -> None:
        """They are there now and were used now; of more than there is room for, the first ones."""
        for key in reversed(keys[: self.capacity]):  # the last one is the first to go
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self.capacity:
            self._keys.popitem(last=False)

    def observe(self, expected: int, found: int) -> None:
        """Of `expected` tokens so many were there."""
        if expected > 0:
            self.trust += _LATEST * (min(1.0, found / expected) - self.trust)


class PrefixIndex:
    """What all workers have. A worker that leaves the pool takes its entry with it, and one that has restarted, which
    its incarnation tells, begins anew."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: blocks that are remembered of a worker at most; fewer where it has fewer."""
        self._capacity = capacity
        self._workers: WeakKeyDictionary[Worker, KnownBlocks] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Blocks, over all workers."""
        return sum(len(known) for known in self._workers.values())

    def of(self, worker: Worker) -> KnownBlocks:
        """Of a worker that has answered before."""
        assert worker.status is not None
        known = self._workers.get(worker)
        if known is None or known.incarnation != worker.status.incarnation:
            capacity = max(1, min(self._capacity, worker.status.blocks_total))
            known = self._workers[worker] = KnownBlocks(worker.status.incarnation, capacity)
        return known
