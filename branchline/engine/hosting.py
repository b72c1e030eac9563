"""An engine from load to end, on a thread of its own: what prefill and decode workers have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from branchline.engine.thread import EngineThread

#: Seconds that the engine has for its last commands, a step in progress or the end of loading included.
STOP_S = 30.0

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Lives on the engine's thread."""

    def step(self) -> bool:
        """One unit of work; False when there was none."""
        ...

    def close(self) -> None:
        """Frees everything, and checks that nothing is left over."""
        ...


E = TypeVar("E", bound=Engine)


@dataclass(frozen=True)
class Host(Generic[E]):
    """A loaded engine and its thread."""

    thread: EngineThread
    engine: E
    stopping: asyncio.Future[Any]

    async def until_stopped(self, *others: asyncio.Future[Any]) -> None:
        """Returns when it is time to stop. Raises what ended the engine, or one of `others`, before."""
        await _first_of(self.stopping, self.thread.failed, *others)
        for ended in (self.thread.failed, *others):
            if ended.done():
                ended.result()


@asynccontextmanager
async def hosted_engine(name: str, build: Callable[[], E], stop: asyncio.Event) -> AsyncIterator[Host[E] | None]:
    """Builds an engine on a new thread, which owns all that it loads, and frees both in the end.

    Gives None when `stop` was set while it loaded. Raises what `build` raises.
    """
    thread = EngineThread(name)
    stopping = asyncio.create_task(stop.wait())
    try:
        loading = thread.submit(_build, build, thread)
        await _first_of(loading, stopping)
        if stop.is_set():
            yield None
            return
        host = Host(thread, loading.result(), stopping)
        try:
            yield host
        finally:
            if not thread.failed.done():
                await asyncio.wait_for(thread.submit(host.engine.close), STOP_S)
    finally:
        stopping.cancel()
        if not await thread.stop(STOP_S):
            logger.error("the engine's thread did not end within %g s", STOP_S)


def _build(build: Callable[[], E], thread: EngineThread) -> E:
    engine = build()
    thread.use(engine.step)
    return engine


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
