"""One thread that owns an engine: it runs commands between steps, and steps while there is work.

asyncio code submits callables and awaits their results; the callables run on the engine's thread, one at a
time and in the order of submission, never in the middle of a step. So the engine needs no locks.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: What the commands of one iteration may cost, in bytes moved; then it is the running requests' turn.
ITERATION_BUDGET = 8 << 20
#: The least that a command costs, so that many small ones are bounded as well.
COMMAND_COST = 16 << 10

logger = logging.getLogger(__name__)


class EngineStoppedError(RuntimeError):
    """The engine's thread has ended, by `stop` or by a failure; the command didn't run."""


@dataclass(frozen=True, slots=True)
class _Command:
    run: Callable[[], None]
    refuse: Callable[[EngineStoppedError], None]
    cost: int


class EngineThread:
    """Owns the engine's thread. Create and call it on one asyncio event loop, except where noted.

    `step` does one unit of work and says whether there was any. While there is, commands are taken in between,
    up to `ITERATION_BUDGET` an iteration; while there is none, the thread sleeps until the next command. A step
    that raises ends the thread: `failed` gets the exception and every waiting command is refused.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._step: Callable[[], bool] = _no_work
        self._gate = threading.Lock()
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        #: Set when the engine failed for good. Never set by `stop`.
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()

    def use(self, step: Callable[[], bool]) -> None:
        """Sets the step. To be called on the engine's thread, by the command that builds the engine."""
        assert threading.current_thread() is self._thread
        self._step = step

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Runs `function` on the engine's thread. Cancelling the future drops the result, not the command."""
        return self._submit(lambda: function(*args, **kwargs), COMMAND_COST)

    def submit_bulk(self, cost: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """As `submit`, for a command that moves `cost` bytes."""
        return self._submit(lambda: function(*args, **kwargs), max(cost, COMMAND_COST))

    def deliver(self, callback: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Runs `callback` on the event loop, in the order of the calls. From the engine's thread."""
        self._loop.call_soon_threadsafe(lambda: callback(*args, **kwargs))

    async def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the commands submitted so far; False when it didn't end in time."""
        ending = self._submit(self._request_stop, COMMAND_COST)
        deadline = self._loop.time() + timeout_s
        while self._thread.is_alive() and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        for future in (ending, self.failed):
            if not future.cancel() and not future.cancelled():
                future.exception()  # seen; the thread has logged what there is to log
        return not self._thread.is_alive()

    def _request_stop(self) -> None:
        self._stopping = True

    def _submit(self, call: Callable[[], T], cost: int) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = call()
            except Exception as error:  # noqa: BLE001 - it crosses the thread border to whoever awaits
                self.deliver(_set_exception, future, error)
            else:
                self.deliver(_set_result, future, result)

        def refuse(error: EngineStoppedError) -> None:
            self.deliver(_set_exception, future, error)

        with self._gate:
            if self._closed:
                future.set_exception(EngineStoppedError("the engine has stopped"))
            else:
                self._commands.put(_Command(run, refuse, cost))
        return future

    def _run(self) -> None:
        try:
            busy = False
            while not self._stopping:
                self._drain(wait=not busy)
                busy = not self._stopping and self._step()
        except Exception as error:
            logger.exception("the engine failed")
            self.deliver(_set_exception, self.failed, error)
        finally:
            self._close()

    def _drain(self, *, wait: bool) -> None:
        spent = 0
        while spent < ITERATION_BUDGET and not self._stopping:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            command.run()
            spent += command.cost

    def _close(self) -> None:
        with self._gate:
            self._closed = True
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command.refuse(EngineStoppedError("the engine has stopped"))


def _no_work() -> bool:
    return False


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
