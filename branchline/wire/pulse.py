"""Wakes whoever waits for something to change."""

from __future__ import annotations

import asyncio


class Pulse:
    """Belongs to one event loop. Who looks, finds nothing to do and then waits for `next`, without an await in between,
    misses no beat."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def next(self) -> asyncio.Future[None]:
        """Done with the next beat. It is everybody's: not to be cancelled, so wait for it by `asyncio.wait`."""
        return self._next

    def beat(self) -> None:
        self._next.set_result(None)
        self._next = asyncio.get_running_loop().create_future()
