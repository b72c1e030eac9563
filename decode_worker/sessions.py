"""What the decode worker serves now: each lease with its token stream, its hand-off and its counters.

Lives on the event loop; the engine is reached through commands (`engine_loop`). A session ends in one place,
`_end`, whatever ended it: its events say so to the token stream, and its blocks go back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from branchline.core import DraftTree, FinishReason, InvalidRequestError, Request, SpeculationStats
from branchline.engine.blocks import OutOfBlocksError
from branchline.engine.thread import EngineStoppedError, EngineThread
from branchline.wire.status import RpcFailure
from decode_worker.engine_loop import DecodeLoop, Progress, StepFailure
from decode_worker.leases import Lease, LeaseEndedError, LeaseState, LeaseTable, UnknownLeaseError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of one step; `index` is the output index of the first, `speculation` the lease's up to here."""

    index: int
    token_ids: tuple[int, ...]
    speculation: SpeculationStats


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Aborted:
    reason: str


@dataclass
class Arrived:
    """What has come of a hand-off. It outlives a broken stream, so that the next one goes on from here."""

    next_index: int = 0
    target_bytes: int = 0
    draft_bytes: int = 0
    first_token: int | None = None
    tree: DraftTree = field(default_factory=DraftTree)


@dataclass
class Session:
    """A lease and everything that hangs on it."""

    lease: Lease
    #: For the token stream. Holds at most max_tokens tokens, so it needs no bound of its own.
    events: asyncio.Queue[TokenBatch | Finish | Aborted] = field(default_factory=asyncio.Queue)
    request: Request | None = None
    arrived: Arrived = field(default_factory=Arrived)
    #: The open hand-off stream ends with this failure as soon as it is set.
    handoff_over: asyncio.Future[RpcFailure] | None = None
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    next_output: int = 0


@dataclass
class Totals:
    """Since the start, over all requests."""

    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    emitted_tokens: int = 0
    cold_starts: int = 0


class Sessions:
    """All sessions of the worker."""

    def __init__(
        self, thread: EngineThread, engine: DecodeLoop, table: LeaseTable, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.table = table
        self.totals = Totals()
        self.engine = engine
        self.thread = thread
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._closed = False
        engine.listener = lambda outcome: thread.deliver(self.on_step, outcome)

    async def reserve(
        self, request_id: str, attempt: int, context_length: int, max_length: int, accepts_draft: bool
    ) -> Lease:
        """A new lease with its blocks. Raises InvalidRequestError, RpcFailure when it can't be had now."""
        if self._closed:
            raise RpcFailure(grpc.StatusCode.UNAVAILABLE, "the worker is stopping")
        if not request_id or attempt < 1 or not 1 <= context_length < max_length:
            raise InvalidRequestError(
                "a reservation needs a request_id, an attempt from 1 and 1 <= context_length < max_length, got "
                f"{request_id!r}, {attempt}, {context_length}, {max_length}"
            )
        if self.table.outdated(request_id, attempt):
            raise RpcFailure(grpc.StatusCode.ABORTED, f"a later attempt than {attempt} at {request_id} is running")
        for lease in self.table.superseded(request_id, attempt):
            self.abort(lease.lease_id, f"attempt {attempt} has taken over")
        lease = self.table.create(request_id, attempt, context_length, max_length, accepts_draft, self._clock())
        self._sessions[lease.lease_id] = session = Session(lease)
        try:
            await self.thread.submit(self.engine.reserve, lease.lease_id, context_length, max_length)
        except OutOfBlocksError as error:
            self._abort(session, str(error))
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
        except BaseException as error:
            self._abort(session, f"the reservation failed: {type(error).__name__}")
            raise
        self.table.touch(lease, self._clock())
        return self.find(lease.lease_id).lease

    def find(self, lease_id: str) -> Session:
        """Raises RpcFailure: NOT_FOUND for an unknown lease, ABORTED for one that has ended."""
        try:
            return self._sessions[self.table.get(lease_id).lease_id]
        except UnknownLeaseError as error:
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, str(error)) from None
        except LeaseEndedError as error:
            raise RpcFailure(grpc.StatusCode.ABORTED, f"lease {lease_id} has ended: {error}") from None

    def attach(self, lease_id: str, request: Request) -> Session:
        """Opens the token stream; its caller must call `detach` in the end."""
        session = self.find(lease_id)
        lease = session.lease
        if lease.attached:
            raise RpcFailure(grpc.StatusCode.ALREADY_EXISTS, f"lease {lease_id} is attached already")
        if len(request.context) != lease.context_length or request.max_length > lease.max_length:
            raise InvalidRequestError(
                f"the request has {len(request.context)} context tokens and may reach {request.max_length}, "
                f"the lease was given for {lease.context_length} and {lease.max_length}"
            )
        lease.attached = True
        session.request = request
        session.next_output = len(request.emitted)
        self._start_if_complete(session)
        return session

    def detach(self, session: Session) -> None:
        """The token stream is closed; a session that has not ended is aborted by that."""
        self._abort(session, "the token stream was closed")

    def open_handoff(self, lease_id: str) -> Session:
        """Binds a new hand-off stream to the lease, in place of an earlier one that may be half dead."""
        session = self.find(lease_id)
        self._end_handoff(session, "another hand-off stream has taken over")
        session.handoff_over = asyncio.get_running_loop().create_future()
        if session.lease.state is LeaseState.RESERVED:
            session.lease.advance(LeaseState.RECEIVING)
        self.touch(session)
        return session

    def touch(self, session: Session) -> None:
        self.table.touch(session.lease, self._clock())

    def complete(self, session: Session) -> None:
        """The hand-off has arrived whole and is in the cache."""
        session.lease.advance(LeaseState.READY)
        self.touch(session)
        arrived = session.arrived
        if arrived.draft_bytes == 0 and self.engine.runner.draft_kv is not None:
            self.totals.cold_starts += 1
        _log(session, "ready", f"kv_bytes={arrived.target_bytes + arrived.draft_bytes} tree_nodes={len(arrived.tree)}")
        self._start_if_complete(session)

    def abort(self, lease_id: str, reason: str) -> None:
        """Ends a lease. No error when it is unknown or has ended."""
        session = self._sessions.get(lease_id)
        if session is not None:
            self._abort(session, reason)

    def expire(self) -> None:
        """Aborts the leases whose time is up."""
        for lease in self.table.expired(self._clock()):
            self.abort(lease.lease_id, "the lease expired: nobody used it")

    def close(self, reason: str) -> None:
        """Aborts every session and gives no more leases."""
        self._closed = True
        for session in tuple(self._sessions.values()):
            self._abort(session, reason)

    def on_step(self, outcome: list[Progress] | StepFailure) -> None:
        """The engine's listener, on the event loop."""
        if isinstance(outcome, StepFailure):
            for lease_id in outcome.lease_ids:
                self.abort(lease_id, outcome.reason)
            return
        for progress in outcome:
            self._on_progress(progress)

    def _on_progress(self, progress: Progress) -> None:
        emitted = len(progress.token_ids)
        step = SpeculationStats(1, progress.drafted, emitted - 1)
        self.totals.speculation += step
        self.totals.emitted_tokens += emitted
        session = self._sessions.get(progress.lease_id)
        if session is None:  # aborted while the step ran
            return
        session.speculation += step
        self._emit(session, progress.token_ids)
        if progress.finish is not None:
            session.events.put_nowait(Finish(progress.finish))
            self._end(session, LeaseState.DONE, "it is finished")

    def _emit(self, session: Session, token_ids: tuple[int, ...]) -> None:
        session.events.put_nowait(TokenBatch(session.next_output, token_ids, session.speculation))
        session.next_output += len(token_ids)

    def _start_if_complete(self, session: Session) -> None:
        request, arrived = session.request, session.arrived
        if session.lease.state is not LeaseState.READY or request is None:
            return
        assert arrived.first_token is not None
        session.lease.advance(LeaseState.RUNNING)
        self.totals.emitted_tokens += 1
        self._emit(session, (arrived.first_token,))
        lease_id, has_draft_kv = session.lease.lease_id, arrived.draft_bytes > 0
        started = self.thread.submit(
            self.engine.start, lease_id, request, arrived.first_token, arrived.tree, has_draft_kv
        )
        started.add_done_callback(lambda future: self._on_started(session, future))

    def _on_started(self, session: Session, started: asyncio.Future[None]) -> None:
        error = None if started.cancelled() else started.exception()
        if error is not None and not session.lease.state.ended:
            logger.error("start failed request=%s", session.lease.request_id, exc_info=error)
            self._abort(session, f"the request could not be started: {error}")

    def _abort(self, session: Session, reason: str) -> None:
        if session.lease.state.ended:
            return
        session.events.put_nowait(Aborted(reason))
        self._end(session, LeaseState.ABORTED, reason)

    def _end(self, session: Session, state: LeaseState, reason: str) -> None:
        lease = session.lease
        self.table.end(lease, state, reason)
        del self._sessions[lease.lease_id]
        self._end_handoff(session, f"lease {lease.lease_id} has ended: {reason}")
        self.thread.submit(self.engine.release, lease.lease_id).add_done_callback(_on_released)
        _log(session, state.value, f"tokens={session.next_output} reason={reason!r}")

    def _end_handoff(self, session: Session, reason: str) -> None:
        if session.handoff_over is not None and not session.handoff_over.done():
            session.handoff_over.set_result(RpcFailure(grpc.StatusCode.ABORTED, reason))


def _on_released(released: asyncio.Future[None]) -> None:
    error = None if released.cancelled() else released.exception()
    if error is not None and not isinstance(error, EngineStoppedError):
        logger.error("release failed", exc_info=error)


def _log(session: Session, event: str, facts: str) -> None:
    lease = session.lease
    logger.info("lease=%s request=%s event=%s %s", lease.lease_id, lease.request_id, event, facts)
