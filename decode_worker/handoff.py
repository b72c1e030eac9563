"""The receiving side of a hand-off: its streams, their window and their answers. The frames are `intake`'s.

Each stream's coroutine waits for whichever comes first: its next message, an import, the lease's end, or the
deadline. So answers flow while the sender is silent, and memory is bounded by the window that the streams share.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc

from branchline.core import InvalidRequestError
from branchline.v1 import decode_pb2
from branchline.wire.frames import DamagedFrameError, read_kv_frame
from branchline.wire.kv_codec import Incoming, KvView, part_of
from branchline.wire.seals import intact, seal
from branchline.wire.status import RpcFailure
from branchline.wire.transfer import MAX_AHEAD, MAX_STREAMS
from decode_worker.intake import Intake
from decode_worker.session import Session
from decode_worker.sessions import Sessions

#: Frames after which there is an acknowledgement; an earlier one when nothing has been under way for so many seconds.
#: Each costs both sides as much as a small frame, and while frames come fast there is always a next one.
ACKNOWLEDGE_FRAMES = 2
ACKNOWLEDGE_AFTER_S = 0.01


class _SilentStreamError(RpcFailure):
    """Nothing comes on this stream while others of the hand-off live."""


async def receive_handoff(
    sessions: Sessions, requests: AsyncIterator[Incoming]
) -> AsyncGenerator[decode_pb2.HandoffResponse]:
    """One stream, whatever transport brings it: its requests in, its responses out.

    Ends after `ready`, or when the sender closed. Raises RpcFailure or InvalidRequestError with what the sender is to
    be told. `requests` may raise InvalidRequestError for a message that can't be parsed.
    """
    stall_s = sessions.table.ttl_s
    try:
        async with asyncio.timeout(stall_s):
            first = await _next(requests)
    except TimeoutError:
        raise RpcFailure(grpc.StatusCode.DEADLINE_EXCEEDED, "no hand-off header came") from None
    if first is not None:
        _check(first)  # before the lease is looked up: it may be another's
    if first is None or isinstance(first, KvView) or first.WhichOneof("part") != "header":
        raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, "a hand-off begins with a header")
    if first.header.stream >= MAX_STREAMS:
        raise InvalidRequestError(f"stream {first.header.stream}: a hand-off has at most {MAX_STREAMS}")
    session = sessions.open_handoff(first.header.lease_id)
    over = session.group.flow.open(first.header.stream)
    try:
        receiver = _Receiver(sessions, session, requests, over, stall_s)
        async with contextlib.aclosing(receiver.responses(first.header)) as responses:
            async for response in responses:
                yield response
    finally:
        session.group.flow.close(first.header.stream, over)


class _Receiver:
    """One stream, from behind its header. A header that comes again is a heartbeat."""

    def __init__(
        self,
        sessions: Sessions,
        session: Session,
        requests: AsyncIterator[Incoming],
        over: asyncio.Future[RpcFailure],
        stall_s: float,
    ) -> None:
        self._sessions = sessions
        self._session = session
        self._group = session.group
        self._flow = session.group.flow
        self._frames = session.group.arrived.frames
        self._intake = Intake(sessions, session.group)
        self._requests = requests
        self._over = over
        self._stall_s = stall_s
        #: The sender has closed its side.
        self._closed = False
        self._heard = self._flow.heard = time.monotonic()

    async def responses(self, header: decode_pb2.HandoffHeader) -> AsyncGenerator[decode_pb2.HandoffResponse]:
        """Acknowledgements, the last of them `ready`. Ends without one when the sender closed before its commit.

        Errors that no repetition can mend abort the lease. A damaged message doesn't: it may be sent again. Nor does a
        header that doesn't fit.
        """
        self._intake.check_header(header)
        yield self._response()
        reading = asyncio.create_task(_next(self._requests))
        resend: list[int] | None = None
        try:
            while not self._over.done():
                self._finish_if_due()
                if self._group.complete:
                    yield self._response(ready=True)
                    return
                if resend is not None or self._owes_acknowledgement:
                    yield self._response(resend or ())
                    resend = None
                    continue  # meanwhile something may have become due
                await self._wait(reading)
                if reading.done() and self._may_read and not self._over.done():
                    request = reading.result()
                    if request is not None:
                        resend = self._take(request)
                        reading = asyncio.create_task(_next(self._requests))
                    elif self._flow.commit is None:
                        return
                    else:
                        self._closed = True
        except (DamagedFrameError, _SilentStreamError):
            raise
        except (InvalidRequestError, RpcFailure) as error:
            self._sessions.live.abort(self._session.lease.lease_id, f"the hand-off failed: {error}")
            raise
        finally:
            reading.add_done_callback(_seen)
            reading.cancel()
        raise self._over.result()

    @property
    def _may_read(self) -> bool:
        return self._flow.has_room and not self._closed

    @property
    def _owes_acknowledgement(self) -> bool:
        news = self._frames.next - self._flow.acknowledged
        return news >= ACKNOWLEDGE_FRAMES or (news > 0 and self._idle_s >= ACKNOWLEDGE_AFTER_S)

    @property
    def _idle_s(self) -> float:
        """Seconds since nothing is under way."""
        return 0.0 if self._flow.in_flight > 0 else time.monotonic() - self._flow.idle_since

    def _response(self, resend: list[int] | tuple[()] = (), *, ready: bool = False) -> decode_pb2.HandoffResponse:
        self._flow.acknowledged = self._frames.next
        response = decode_pb2.HandoffResponse(next_index=self._frames.next, ready=ready, resend=resend)
        seal(response)
        return response

    async def _wait(self, reading: asyncio.Task[Any]) -> None:
        waiting: set[asyncio.Future[Any]] = {self._over, self._flow.changed.next}
        if self._may_read:
            waiting.add(reading)
        owes = self._frames.next > self._flow.acknowledged and self._flow.in_flight == 0
        timeout_s = max(0.0, ACKNOWLEDGE_AFTER_S - self._idle_s) if owes else self._stall_s
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._flow.in_flight > 0 or reading.done() or self._over.done():  # the sender is not late
            return
        now = time.monotonic()
        if now - max(self._heard, self._flow.idle_since) >= self._stall_s:
            if now - self._flow.heard < self._stall_s:
                raise _SilentStreamError(grpc.StatusCode.UNAVAILABLE, f"the stream was silent for {self._stall_s:g} s")
            raise RpcFailure(grpc.StatusCode.ABORTED, f"the hand-off stalled for {self._stall_s:g} s")
        if self._flow.commit is not None and now - self._flow.progressed >= self._stall_s:
            raise RpcFailure(
                grpc.StatusCode.DATA_LOSS,
                f"{self._flow.commit.frames} frames were sent, {len(self._frames)} came, and no more for "
                f"{self._stall_s:g} s",
            )

    def _take(self, request: Incoming) -> list[int] | None:
        """The frames that are to be sent again at once, if this is to be answered at once."""
        self._heard = self._flow.heard = time.monotonic()
        self._sessions.live.touch(*self._group.live)
        match part_of(request):
            case "header", header:
                self._intake.check_header(header)
                return self._flow.overdue(self._frames)
            case "kv", frame:
                return self._take_frame(self._intake.take_kv, frame)
            case "draft", frame:
                return self._take_frame(self._intake.take_draft, frame)
            case "commit", commit:
                if not intact(commit):
                    raise DamagedFrameError("a hand-off's commit: wrong checksum")
                self._flow.commit = commit
                self._flow.progressed = time.monotonic()
                return None
            case _:
                raise _no_part()

    def _take_frame(self, take: Callable[[Any], asyncio.Future[None] | None], frame: Any) -> list[int] | None:
        try:
            imported = take(frame)
        except DamagedFrameError:
            # The index may be what is damaged. Where it can't be right, a new stream tells the sender what is missing;
            # where it can, but isn't, a heartbeat finds the gap.
            if frame.index >= self._frames.next + MAX_AHEAD or frame.index in self._frames:
                raise
            self._flow.repair(frame.index)
            return [frame.index]
        if imported is not None:
            self._flow.take_over(imported)
        return None

    def _finish_if_due(self) -> None:
        """Whichever stream sees it first completes the hand-off. Raises RpcFailure when something has not come."""
        commit, flow = self._flow.commit, self._flow
        if commit is None or self._group.complete or flow.in_flight > 0 or len(self._frames) < commit.frames:
            return
        self._intake.finish(commit)
        flow.changed.beat()


async def _next(requests: AsyncIterator[Incoming]) -> Incoming | None:
    """The next request, None at the end. Raises DamagedFrameError for one that can't be parsed."""
    try:
        return await anext(requests, None)
    except InvalidRequestError as error:
        raise DamagedFrameError(str(error)) from None


def _check(request: Incoming) -> None:
    """Raises DamagedFrameError, or InvalidRequestError for coordinates that are no rectangle."""
    match part_of(request):
        case None, _:
            raise _no_part()
        case "kv", frame:
            read_kv_frame(frame)
        case name, part:
            if not intact(part):
                raise DamagedFrameError(f"a hand-off's {name}: wrong checksum")


def _no_part() -> DamagedFrameError:
    """A field that nobody knows is what a flipped bit makes of another."""
    return DamagedFrameError("a hand-off request without a part")


def _seen(future: asyncio.Future[Any]) -> None:
    """For futures that nobody may come to await: their error is not to be reported as forgotten."""
    if not future.cancelled():
        future.exception()
