"""Runs a role's `serve` coroutine in a thread with its own event loop, so that whoever owns it can ask how it goes.

Imports neither ray nor torch: the role's module is imported inside the thread, after its cores are set.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import importlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

from branchline.config import Config
from branchline.workload import Workload

#: Seconds between two looks at a role's load.
LOAD_INTERVAL_S = 0.25

Hooks = dict[str, Any]


class State(enum.StrEnum):
    """Where a role stands. A process that Ray has just (re)started is idle until it is told to serve."""

    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Status:
    """An answer to "how is it going"."""

    state: State
    #: HOST:PORT once ready, else empty.
    address: str = ""
    #: The same of a gateway's HTTP API, if it serves one.
    http: str = ""
    #: What went wrong, one line, when failed.
    error: str = ""
    #: The user can mend it (configuration, model, port): the launcher exits with 2 rather than 1.
    user_error: bool = False
    #: Progress lines from the asked number on, and the number to ask for next.
    lines: tuple[str, ...] = ()
    next_line: int = 0
    #: At most LOAD_INTERVAL_S old unless its event loop hangs; None before it tells one.
    load: Workload | None = None


class RoleThread:
    """One role's `serve`, running in a thread.

    `serve_path` is "module:function". Calls are safe from any thread; none of them blocks but `stop`.
    """

    def __init__(self, serve_path: str) -> None:
        module, _, function = serve_path.partition(":")
        assert module, f"not module:function: {serve_path!r}"
        assert function, f"not module:function: {serve_path!r}"
        self._module = module
        self._function = function
        self._lock = threading.Lock()
        self._running: Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._stopping = False
        self._address = self._http = ""
        self._lines: list[str] = []
        self._ask_load: Callable[[], Workload] | None = None
        self._load: Workload | None = None

    def start(self, config: Config, cores: Sequence[int] = (), **hooks: Any) -> None:
        """Begins to serve, on the given cores if any; does nothing when it has begun already.

        `hooks` are further arguments of this role's `serve`.
        """
        with self._lock:
            if self._running is not None:
                return
            # A future rather than a bare thread: it carries whatever ends `serve` to `status`.
            executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self._module)
            self._running = executor.submit(self._run, config, tuple(cores), hooks)
            executor.shutdown(wait=False)

    def status(self, since: int = 0) -> Status:
        with self._lock:
            running, address, lines, total = self._running, self._address, self._lines[since:], len(self._lines)
            http, load = self._http, self._load
        state, error = State.IDLE, None
        if running is not None and running.done():
            error = running.exception()
            state = State.STOPPED if error is None else State.FAILED
        elif running is not None:
            state = State.READY if address else State.LOADING
        return Status(
            state=state,
            address=address if state is State.READY else "",
            http=http if state is State.READY else "",
            error=_one_line(error) if error else "",
            user_error=error is not None and is_user_error(error),
            lines=tuple(lines),
            next_line=total,
            load=load if state is State.READY else None,
        )

    def stop(self, grace_s: float) -> bool:
        """Asks `serve` to return and waits up to `grace_s` seconds; True when it has."""
        with self._lock:
            self._stopping = True
            loop, stop, running = self._loop, self._stop, self._running
        if running is None:
            return True
        if loop is not None and stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
                loop.call_soon_threadsafe(stop.set)
        with contextlib.suppress(FutureTimeoutError):
            running.exception(timeout=grace_s)
        return running.done()

    def call(self, function: Callable[[], None]) -> None:
        """Calls it soon on the role's event loop; not at all when that has ended, or has not begun."""
        with self._lock:
            loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has closed
                loop.call_soon_threadsafe(function)

    def _run(self, config: Config, cores: tuple[int, ...], hooks: Hooks) -> None:
        if cores:
            # For this thread and all that it starts: the compute threads, not those of Ray.
            os.sched_setaffinity(0, cores)
        serve = getattr(importlib.import_module(self._module), self._function)
        asyncio.run(self._main(serve, config, hooks))

    async def _main(self, serve: Callable[..., Any], config: Config, hooks: Hooks) -> None:
        stop = asyncio.Event()
        with self._lock:
            self._loop, self._stop = asyncio.get_running_loop(), stop
            if self._stopping:
                return
        looks = asyncio.create_task(self._look_at_load())
        try:
            await serve(config, ready=self._ready, stop=stop, progress=self._progress, on_load=self._take_load, **hooks)
        finally:
            looks.cancel()

    def _take_load(self, ask: Callable[[], Workload]) -> None:
        self._ask_load = ask

    async def _look_at_load(self) -> None:
        """On the role's own loop: nothing of the role is read by another thread."""
        while True:
            if self._ask_load is not None:
                load = self._ask_load()
                with self._lock:
                    self._load = load
            await asyncio.sleep(LOAD_INTERVAL_S)

    def _ready(self, address: str, http: str = "") -> None:
        with self._lock:
            self._address, self._http = address, http

    def _progress(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)


#: Errors whose message tells the user what to change, by class name: their modules need not be importable here.
USER_ERRORS = frozenset({"ConfigError", "ModelError", "BindError", "InvalidRequestError"})


def is_user_error(error: BaseException) -> bool:
    """Whether the configuration, the model or the port is at fault, rather than the program."""
    return any(cls.__name__ in USER_ERRORS for cls in type(error).__mro__)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text and is_user_error(error) else f"{type(error).__name__}: {text}"
