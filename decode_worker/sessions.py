"""What the decode worker does for a lease: reserve it, attach its stream, take its hand-off, run it, end it.

Lives on the event loop; the engine is reached through commands (`engine_loop`) and answers with events. The sessions
themselves, and how they end, are in `live`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc

from branchline.core import FinishReason, InvalidRequestError, Request, SpeculationStats, TokenLogprobs
from branchline.engine.thread import EngineThread
from branchline.observe.logs import about
from branchline.wire.status import RpcFailure
from decode_worker.engine_loop import DecodeLoop, EngineEvent, Granted, Preemption, Progress, StepFailure, Stepped
from decode_worker.leases import Lease, LeaseState, LeaseTable
from decode_worker.live import LiveSessions
from decode_worker.reservations import Ask, Reservations
from decode_worker.session import Aborted, Finish, Preempted, SampleGroup, Session, TokenBatch, Totals

logger = logging.getLogger(__name__)


class Sessions:
    """All sessions of the worker, and those who wait for one."""

    def __init__(
        self, thread: EngineThread, engine: DecodeLoop, table: LeaseTable, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.totals = Totals()
        self.engine = engine
        self.thread = thread
        self.table = table
        self.live = LiveSessions(thread, engine, table, clock)
        self.waiting = Reservations(thread, engine, self.live.open, self.live.abort)
        self._clock = clock
        self._closed = False
        engine.listener = lambda event: thread.deliver(self.on_engine_event, event)

    async def reserve(self, ask: Ask, wait_s: float) -> list[Lease]:
        """A new lease with its blocks for each sample, once it is their turn.

        Raises InvalidRequestError, or RpcFailure when they can't be had within `wait_s`. A lease may have ended again
        already; whoever attaches to it hears of that.
        """
        if self._closed:
            raise RpcFailure(grpc.StatusCode.UNAVAILABLE, "the worker is stopping")
        ask.check(self.engine.runner.max_batch)
        request_id, attempt = ask.request_id, ask.attempt
        if self.table.outdated(request_id, attempt) or self.waiting.outdated(request_id, attempt):
            raise RpcFailure(grpc.StatusCode.ABORTED, f"a later attempt than {attempt} at {request_id} is running")
        reason = f"attempt {attempt} has taken over"
        for lease in self.table.superseded(request_id, attempt):
            self.live.abort(lease.lease_id, reason)
        self.waiting.supersede(request_id, attempt, reason)
        return await self.waiting.obtain(ask, self.table.new_ids(attempt, ask.samples), self._clock(), wait_s)

    def attach(self, lease_id: str, request: Request) -> Session:
        """Opens the token stream; its caller must call `detach` in the end."""
        session = self.live.find(lease_id)
        lease = session.lease
        if lease.attached:
            raise RpcFailure(grpc.StatusCode.ALREADY_EXISTS, f"lease {lease_id} is attached already")
        if session.group.context not in ((), request.context):
            raise InvalidRequestError(f"the context is not the one that lease {lease_id} was given for")
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
        self.live.abort(session.lease.lease_id, "the token stream was closed")

    def open_handoff(self, lease_id: str) -> Session:
        """The hand-off of sample 0's lease begins, or goes on, with another stream."""
        session = self.live.find(lease_id)
        if session.sample > 0:
            raise InvalidRequestError(f"lease {lease_id} is sample {session.sample}'s: sample 0's takes the hand-off")
        group = session.group
        for member in group.live:
            if member.lease.state is LeaseState.RESERVED:
                member.lease.advance(LeaseState.RECEIVING)
        self.live.touch(*group.live)
        return session

    def complete(self, group: SampleGroup) -> None:
        """The hand-off has arrived whole and is in the cache."""
        group.complete = True
        self.live.touch(*group.live)
        lease = group.members[0].lease
        self.totals.reused_tokens += lease.held_tokens
        self.totals.received_tokens += lease.context_length - lease.held_tokens
        lease_ids = [member.lease.lease_id for member in group.live]
        shared = self.thread.submit(self.engine.share, lease_ids, group.arrived.has_draft_kv)
        shared.add_done_callback(lambda future: self._check(group.live, "the hand-off could not be shared", future))
        for member in group.live:
            member.lease.advance(LeaseState.READY)
            tree = group.arrived.samples[member.sample].tree
            facts = f"held_tokens={member.lease.held_tokens} kv_bytes={group.arrived.kv_bytes} tree_nodes={len(tree)}"
            member.log("ready", facts)
        for member in group.live:
            self._start_if_complete(member)

    def close(self, reason: str) -> None:
        """Aborts every session, and whoever waits for one, and gives no more leases."""
        self._closed = True
        self.waiting.close(reason)
        self.live.abort_all(reason)

    def on_engine_event(self, event: EngineEvent) -> None:
        """The engine's listener, on the event loop."""
        match event:
            case Granted(reservation, held_tokens):
                self.waiting.granted(reservation, held_tokens)
            case Stepped(progress):
                for one in progress:
                    self._on_progress(one)
            case Preemption(lease_ids):
                self.totals.preemptions += len(lease_ids)
                for lease_id in lease_ids:
                    if (session := self.live.get(lease_id)) is not None:
                        self.live.end(session, Preempted("its blocks went to a request that comes first"))
            case StepFailure(lease_ids, reason):
                for lease_id in lease_ids:
                    self.live.abort(lease_id, reason)

    def _on_progress(self, progress: Progress) -> None:
        emitted = len(progress.token_ids)
        step = SpeculationStats(1, progress.drafted, emitted - 1)
        self.totals.speculation += step
        self.totals.emitted_tokens += emitted
        self.totals.forwards_by_tokens[emitted] += 1
        session = self.live.get(progress.lease_id)
        if session is None:  # aborted while the step ran
            return
        session.speculation += step
        _emit(session, progress.token_ids, progress.logprobs)
        if progress.finish is not None:
            self.live.end(session, Finish(progress.finish))

    def _start_if_complete(self, session: Session) -> None:
        request, arrived = session.request, session.group.arrived.samples[session.sample]
        if session.lease.state is not LeaseState.READY or request is None:
            return
        token_id, logprobs = arrived.first_token, arrived.logprobs
        assert token_id is not None
        if request.logprobs is not None and logprobs is None:
            self.live.end(session, Aborted("the hand-off brought no log-probabilities of the first token"))
            return
        session.lease.advance(LeaseState.RUNNING)
        self.totals.emitted_tokens += 1
        _emit(session, (token_id,), () if request.logprobs is None or logprobs is None else (logprobs,))
        if (finish := self._finish_after(request, token_id)) is not None:
            self.live.end(session, Finish(finish))
            return
        has_draft_kv = arrived.row_bytes > 0
        if not has_draft_kv and session.sample == 0 and self.engine.runner.draft_kv and request.draft_nodes != 0:
            self.totals.cold_starts += 1
        lease_id = session.lease.lease_id
        started = self.thread.submit(self.engine.start, lease_id, request, token_id, arrived.tree, has_draft_kv)
        started.add_done_callback(lambda future: self._check([session], "the request could not be started", future))

    def _finish_after(self, request: Request, first_token: int) -> FinishReason | None:
        """Whether the first token ends the request, which then needs no place in the batch."""
        if (finish := request.finish_after(first_token)) is not None:
            return finish
        return FinishReason.LENGTH if len(request.context) + 1 >= self.engine.runner.max_model_len else None

    def _check(self, sessions: list[Session], what: str, done: asyncio.Future[None]) -> None:
        """Aborts sessions when a command for them has failed; those that have ended meanwhile don't mind."""
        error = None if done.cancelled() else done.exception()
        for session in sessions if error is not None else ():
            if not session.lease.state.ended:
                logger.error("%s", what, extra=about(session.lease.request_id), exc_info=error)
                self.live.end(session, Aborted(f"{what}: {error}"))


def _emit(session: Session, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
    session.events.put_nowait(TokenBatch(session.next_output, token_ids, session.speculation, logprobs))
    session.next_output += len(token_ids)
