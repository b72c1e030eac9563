"""The receiving side of a hand-off: one stream, its window and its acknowledgements. The frames are `intake`'s.

One coroutine waits for whichever comes first: the next message, the oldest import, the lease's end, or the
deadline. So acknowledgements flow while the sender is silent, and memory is bounded by `WINDOW_FRAMES`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from branchline.core import InvalidRequestError
from branchline.v1 import decode_pb2
from branchline.wire.frames import DamagedFrameError
from branchline.wire.status import RpcFailure
from decode_worker.engine_loop import SequenceGoneError
from decode_worker.intake import Intake, settled_at_once
from decode_worker.session import Session
from decode_worker.sessions import Sessions

#: Frames of one stream that may wait for the engine at once.
WINDOW_FRAMES = 16


class HandoffReceiver:
    """One Handoff stream, from behind its header. A header that comes again is a heartbeat."""

    def __init__(
        self,
        sessions: Sessions,
        session: Session,
        requests: AsyncIterator[decode_pb2.HandoffRequest],
        stall_s: float,
    ) -> None:
        self._sessions = sessions
        self._session = session
        self._group = session.group
        self._intake = Intake(sessions, session.group)
        self._requests = requests
        self._stall_s = stall_s
        #: Frames on their way into the cache: the next index once they are in, and the import.
        self._imports: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._commit: decode_pb2.CommitFrame | None = None

    async def responses(self, header: decode_pb2.HandoffHeader) -> AsyncGenerator[decode_pb2.HandoffResponse]:
        """Acknowledgements, the last of them `ready`. Ends without one when the sender closed before its commit.

        Errors that no repetition can mend abort the lease. A damaged frame doesn't: it may be sent again. Nor does a
        header that doesn't fit.
        """
        self._intake.check_header(header)
        over = self._group.handoff_over
        assert over is not None
        yield decode_pb2.HandoffResponse(next_index=self._group.arrived.next_index)
        reading = asyncio.create_task(_next(self._requests))
        try:
            while not over.done():
                await self._wait(over, reading)
                if over.done():
                    break
                if (settled := self._settle()) is not None:
                    yield decode_pb2.HandoffResponse(next_index=settled)
                if self._commit is None and self._has_room and reading.done():
                    request = reading.result()
                    if request is None:
                        return
                    self._take(request)
                    if self._commit is None:
                        reading = asyncio.create_task(_next(self._requests))
                if self._commit is not None and not self._imports:
                    self._intake.finish(self._commit)
                    yield decode_pb2.HandoffResponse(next_index=self._group.arrived.next_index, ready=True)
                    return
        except DamagedFrameError:
            raise
        except (InvalidRequestError, RpcFailure) as error:
            self._sessions.live.abort(self._session.lease.lease_id, f"the hand-off failed: {error}")
            raise
        finally:
            reading.add_done_callback(_seen)
            reading.cancel()
        raise over.result()

    @property
    def _has_room(self) -> bool:
        """A full window stops the reading; gRPC's flow control then holds the sender back."""
        return len(self._imports) < WINDOW_FRAMES

    async def _wait(self, over: asyncio.Future[RpcFailure], reading: asyncio.Task[Any]) -> None:
        waiting: set[asyncio.Future[Any]] = {over}
        if self._imports:
            waiting.add(self._imports[0][1])
        if self._commit is None and self._has_room:
            waiting.add(reading)
        done, _ = await asyncio.wait(waiting, timeout=self._stall_s, return_when=asyncio.FIRST_COMPLETED)
        if not done and not self._imports:  # it is the sender that is late, not the engine
            raise RpcFailure(grpc.StatusCode.ABORTED, f"the hand-off stalled for {self._stall_s:g} s")

    def _settle(self) -> int | None:
        """Takes the imports that are done off the window; the index of the frame behind the last of them."""
        settled = None
        while self._imports and self._imports[0][1].done():
            settled, imported = self._imports.popleft()
            try:
                imported.result()
            except SequenceGoneError as error:
                raise RpcFailure(grpc.StatusCode.ABORTED, str(error)) from None
        return settled

    def _take(self, request: decode_pb2.HandoffRequest) -> None:
        self._sessions.live.touch(*self._group.live)
        match request.WhichOneof("part"):
            case "header":
                self._intake.check_header(request.header)
            case "kv":
                imported = self._intake.take_kv(request.kv)
                if imported is not None:
                    self._imports.append((self._group.arrived.next_index, imported))
            case "draft":
                if self._intake.take_draft(request.draft):
                    self._imports.append((self._group.arrived.next_index, settled_at_once()))
            case "commit":
                self._commit = request.commit
            case _:
                raise InvalidRequestError("a hand-off request without a part")


async def _next(requests: AsyncIterator[decode_pb2.HandoffRequest]) -> decode_pb2.HandoffRequest | None:
    return await anext(requests, None)


def _seen(future: asyncio.Future[Any]) -> None:
    """For futures that nobody may come to await: their error is not to be reported as forgotten."""
    if not future.cancelled():
        future.exception()
