"""Whose turn it is among those who wait for room."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(order=True, slots=True)
class Turn:
    """A place in the queue. Of equal ranks the one that joined first is served first."""

    rank: float
    number: int
    is_first: asyncio.Event = field(default_factory=asyncio.Event, compare=False)

    async def mine(self) -> None:
        """Returns when nobody of a smaller rank waits."""
        await self.is_first.wait()


class Turns:
    """A queue in the order of ranks that never change, so nobody waits for ever. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: list[Turn] = []  # in order
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    def first(self, rank: float) -> bool:
        """Whether somebody of this rank who joined now would be the first."""
        return not self._waiting or rank < self._waiting[0].rank

    @contextlib.contextmanager
    def join(self, rank: float) -> Iterator[Turn]:
        """A place in the queue for the duration of the block."""
        turn = Turn(rank, next(self._numbers))
        bisect.insort(self._waiting, turn)
        self._note_first()
        try:
            yield turn
        finally:
            self._waiting.remove(turn)
            self._note_first()

    def _note_first(self) -> None:
        for place, turn in enumerate(self._waiting[:2]):  # who was the first is now the second at most
            if place == 0:
                turn.is_first.set()
            else:
                turn.is_first.clear()
