"""The sessions that live, by lease id: how they come, and the one way in which they go."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from branchline.engine.thread import EngineThread
from branchline.wire.status import RpcFailure
from decode_worker.admission import Reservation
from decode_worker.arrived import Arrived, SampleArrival
from decode_worker.engine_loop import DecodeLoop
from decode_worker.leases import Lease, LeaseEndedError, LeaseState, LeaseTable, UnknownLeaseError
from decode_worker.reservations import Ask, on_freed
from decode_worker.session import Aborted, Ending, Finish, Preempted, SampleGroup, Session


class LiveSessions:
    """Each live lease of the table with its session."""

    def __init__(self, thread: EngineThread, engine: DecodeLoop, table: LeaseTable, clock: Callable[[], float]) -> None:
        self.table = table
        self._thread = thread
        self._engine = engine
        self._clock = clock
        self._sessions: dict[str, Session] = {}

    def open(self, ask: Ask, reservation: Reservation, held_tokens: int) -> list[Lease]:
        """A session for each sample; their blocks are taken."""
        group = SampleGroup(Arrived([SampleArrival() for _ in reservation.lease_ids]), ask.context)
        expires_at = self._clock() + self.table.ttl_s
        for sample, lease_id in enumerate(reservation.lease_ids):
            lease = Lease(
                lease_id,
                ask.request_id,
                ask.attempt,
                ask.context_length,
                ask.max_length,
                ask.accepts_draft,
                expires_at,
                held_tokens,
            )
            self.table.add(lease)
            self._sessions[lease_id] = session = Session(lease, group, sample)
            group.members.append(session)
        return [member.lease for member in group.members]

    def get(self, lease_id: str) -> Session | None:
        return self._sessions.get(lease_id)

    def find(self, lease_id: str) -> Session:
        """Raises RpcFailure: NOT_FOUND for an unknown lease, ABORTED for one that has ended."""
        try:
            return self._sessions[self.table.get(lease_id).lease_id]
        except UnknownLeaseError as error:
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, str(error)) from None
        except LeaseEndedError as error:
            raise RpcFailure(grpc.StatusCode.ABORTED, f"lease {lease_id} has ended: {error}") from None

    def touch(self, *sessions: Session) -> None:
        """Something arrived for them: their time to live starts again."""
        for session in sessions:
            self.table.touch(session.lease, self._clock())

    def abort(self, lease_id: str, reason: str) -> None:
        """Ends a lease. No error when it is unknown or has ended."""
        session = self._sessions.get(lease_id)
        if session is not None:
            self.end(session, Aborted(reason))

    def expire(self) -> None:
        """Aborts the leases whose time is up."""
        for lease in self.table.expired(self._clock()):
            self.abort(lease.lease_id, "the lease expired: nobody used it")

    def abort_all(self, reason: str) -> None:
        for lease_id in tuple(self._sessions):
            self.abort(lease_id, reason)

    def end(self, session: Session, ending: Ending) -> None:
        """The last event of a live session: its stream hears of it, and its blocks go back.

        Until the hand-off is complete, sample 0 takes the others along: what they wait for will not come.
        """
        lease, group = session.lease, session.group
        reason = "it is finished" if isinstance(ending, Finish) else ending.reason
        state = LeaseState.DONE if isinstance(ending, Finish) else LeaseState.ABORTED
        session.events.put_nowait(ending)
        self.table.end(lease, state, reason, preempted=isinstance(ending, Preempted))
        del self._sessions[lease.lease_id]
        self._thread.submit(self._engine.release, lease.lease_id).add_done_callback(on_freed)
        session.log(state.value, f"tokens={session.next_output} reason={reason!r}")
        if session.sample == 0:
            group.flow.end(f"lease {lease.lease_id} has ended: {reason}")
            if not group.complete:
                for member in group.live:
                    self.end(member, ending)
