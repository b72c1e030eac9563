"""Which frames of a hand-off are there, when they come in any order and more than once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class IndexSet:
    """Indices from 0: all below `next`, and those of `_beyond`. Small as long as what is missing comes soon."""

    #: The lowest index that is missing.
    next: int = 0
    _beyond: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return self.next + len(self._beyond)

    def __contains__(self, index: int) -> bool:
        return index < self.next or index in self._beyond

    @property
    def end(self) -> int:
        """One more than the highest index that is there."""
        return max(self._beyond, default=self.next - 1) + 1

    def add(self, index: int) -> None:
        """Raises AssertionError when it is there already."""
        assert index not in self, index
        self._beyond.add(index)
        while self.next in self._beyond:
            self._beyond.remove(self.next)
            self.next += 1

    def missing(self, end: int) -> Iterator[int]:
        """The indices below `end` that are not there, rising."""
        return (index for index in range(self.next, end) if index not in self._beyond)
