"""The calls of one attempt, whose responses come together in one queue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from branchline.v1 import decode_pb2, prefill_pb2
from branchline.wire.status import RpcFailure
from gateway.background import cancel_all
from gateway.worker import Worker

#: Events between the calls and the attempt; when they are full, gRPC's flow control slows the workers down.
_QUEUE = 64


@dataclass(frozen=True, slots=True)
class Ended:
    """A call's stream is over; `failure` is None when it ended well."""

    worker: Worker
    failure: RpcFailure | None = None


Event = decode_pb2.AttachResponse | prefill_pb2.PrefillResponse | Ended

#: The key of the prefill worker's call; that of a token stream is its sample's number.
PREFILL = -1


class Legs:
    """`waited_s` is a clock that runs only while `next` waits: time that a slow client takes is no worker's."""

    def __init__(self, name: str, timeout_s: float, metadata: Sequence[tuple[str, str]] = ()) -> None:
        """`name` is for the tasks, `timeout_s` the calls' deadline, `metadata` goes with each."""
        self.waited_s = 0.0
        self._name = name
        self._timeout_s = timeout_s
        self._metadata = metadata
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(maxsize=_QUEUE)
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def open(self, key: int, worker: Worker, method: str, request: Any) -> None:
        assert key not in self._tasks
        task = asyncio.create_task(self._read(key, worker, method, request), name=f"{method} {self._name}")
        self._tasks[key] = task

    async def next(self, timeout_s: float) -> tuple[int, Event]:
        """A call's key, and what came from it. Raises TimeoutError when nothing comes for `timeout_s`."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._events.get()
        finally:
            self.waited_s += time.monotonic() - began

    def cancel(self, key: int) -> None:
        """Cancels one call, without waiting for its end. Idempotent."""
        self._tasks[key].cancel()

    async def close(self) -> None:
        """Cancels all calls and returns when they have ended."""
        await cancel_all(set(self._tasks.values()))

    async def _read(self, key: int, worker: Worker, method: str, request: Any) -> None:
        failure = None
        try:
            async with contextlib.aclosing(
                worker.stream(method, request, self._timeout_s, self._metadata)
            ) as responses:
                async for response in responses:
                    await self._events.put((key, response))
        except RpcFailure as error:
            failure = error
        await self._events.put((key, Ended(worker, failure)))
