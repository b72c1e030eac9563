"""An event loop whose clock jumps to the next timer instead of waiting for it: hours of a simulation in seconds."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")


class _Clock(selectors.BaseSelector):
    """A selector that lets time pass when there is nothing to do."""

    def __init__(self) -> None:
        self.now = 0.0
        self._real = selectors.DefaultSelector()

    def monotonic(self) -> float:
        return self.now

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if not ready:
            assert timeout is not None, "the simulation waits for something that will never happen"
            self.now += max(0.0, timeout)
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`; `time.monotonic()` is the virtual clock meanwhile, for all of the process. Nothing in it may
    wait for the outside world."""
    clock = _Clock()
    with (
        mock.patch.object(time, "monotonic", clock.monotonic),
        asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(clock)) as runner,
    ):
        return runner.run(main)
