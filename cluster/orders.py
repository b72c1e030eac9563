"""Work that other threads want done by the supervisor's."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class RefusedError(RuntimeError):
    """An order that can't be carried out as things are; the message says why."""


class UnknownError(RefusedError):
    """It names what does not exist."""


class EndedError(RefusedError):
    """Nobody is there any more to carry it out."""


class Orders:
    """A queue. `give` may be called from any thread, the rest belongs to the one that carries them out."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False

    def give(self, work: Callable[[], Any]) -> Future[Any]:
        """What `work` returns or raises, when its turn has come; cancelled before that, it is never done."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(EndedError("the system has ended"))
            else:
                self._queue.put((future, work))
        return future

    def carry_out(self) -> None:
        """All that have been given by now."""
        while (order := self._next()) is not None:
            future, work = order
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - whoever gave the order gets it
                future.set_exception(error)

    def close(self) -> None:
        """Refuses those that are left, and all that come."""
        with self._lock:
            self._closed = True
        while (order := self._next()) is not None:
            if order[0].set_running_or_notify_cancel():
                order[0].set_exception(EndedError("the system has ended"))

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            return None
