"""Leases: promises of KV blocks, and the states they go through.

    RESERVED -> RECEIVING -> READY -> RUNNING -> DONE
        \\___________\\__________\\________\\____-> ABORTED

Pure book-keeping: the clock is passed in, and blocks are the engine's (`engine_loop`).
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

#: Ended leases that are remembered, to tell "it ended, because" from "never heard of it".
REMEMBERED = 4096


class LeaseState(enum.Enum):
    RESERVED = "reserved"
    RECEIVING = "receiving"
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    ABORTED = "aborted"

    @property
    def ended(self) -> bool:
        return self in (LeaseState.DONE, LeaseState.ABORTED)


_NEXT = {
    LeaseState.RESERVED: {LeaseState.RECEIVING, LeaseState.ABORTED},
    LeaseState.RECEIVING: {LeaseState.READY, LeaseState.ABORTED},
    LeaseState.READY: {LeaseState.RUNNING, LeaseState.ABORTED},
    LeaseState.RUNNING: {LeaseState.DONE, LeaseState.ABORTED},
    LeaseState.DONE: set(),
    LeaseState.ABORTED: set(),
}


class UnknownLeaseError(LookupError):
    """No such lease was given by this incarnation of the worker."""


class LeaseEndedError(RuntimeError):
    """The lease is DONE or ABORTED; the message says why."""


@dataclass
class Lease:
    """One promise. Times are seconds of a monotonic clock."""

    lease_id: str
    request_id: str
    attempt: int
    #: Tokens whose KV will be shipped, and the most tokens the sequence can reach.
    context_length: int
    max_length: int
    accepts_draft: bool
    expires_at: float
    #: Tokens of the context whose KV is here already: it is not to be shipped.
    held_tokens: int = 0
    state: LeaseState = LeaseState.RESERVED
    attached: bool = False

    def __post_init__(self) -> None:
        assert 1 <= self.context_length < self.max_length, self
        assert 0 <= self.held_tokens < self.context_length, self

    def advance(self, state: LeaseState) -> None:
        """Goes to `state`, which must be a legal successor."""
        assert state in _NEXT[self.state], f"{self.lease_id}: {self.state.name} -> {state.name}"
        assert state is not LeaseState.RUNNING or self.attached, f"{self.lease_id}: RUNNING without a stream"
        self.state = state


@dataclass(frozen=True, slots=True)
class _Ended:
    reason: str
    preempted: bool


@dataclass
class LeaseTable:
    """The leases that have not ended, and why the last ones did. A lease id is `incarnation.attempt.counter`."""

    incarnation: str
    ttl_s: float
    _live: dict[str, Lease] = field(default_factory=dict)
    _ended: OrderedDict[str, _Ended] = field(default_factory=OrderedDict)
    _counter: int = 0
    #: Leases that have ended, by their last state.
    ended: Counter[LeaseState] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> tuple[Lease, ...]:
        return tuple(self._live.values())

    def count(self, state: LeaseState) -> int:
        return sum(lease.state is state for lease in self._live.values())

    def new_ids(self, attempt: int, count: int) -> tuple[str, ...]:
        """Ids for leases that are to be created once they have their blocks."""
        first = self._counter + 1
        self._counter += count
        return tuple(f"{self.incarnation}.{attempt}.{number}" for number in range(first, first + count))

    def add(self, lease: Lease) -> None:
        """From now on it lives."""
        assert lease.lease_id not in self._live, lease
        self._live[lease.lease_id] = lease

    def get(self, lease_id: str) -> Lease:
        """The live lease. Raises LeaseEndedError or UnknownLeaseError."""
        lease = self._live.get(lease_id)
        if lease is not None:
            return lease
        if lease_id in self._ended:
            raise LeaseEndedError(self._ended[lease_id].reason)
        raise UnknownLeaseError(f"unknown lease {lease_id!r}")

    def was_preempted(self, lease_id: str) -> bool:
        """Whether the lease has ended because another request needed its blocks."""
        ended = self._ended.get(lease_id)
        return ended is not None and ended.preempted

    def touch(self, lease: Lease, now: float) -> None:
        """Something arrived for the lease: its time to live starts again."""
        lease.expires_at = max(lease.expires_at, now + self.ttl_s)

    def end(self, lease: Lease, state: LeaseState, reason: str, *, preempted: bool = False) -> None:
        """Ends a live lease and remembers the reason."""
        assert state.ended, state
        assert lease.lease_id in self._live, lease
        lease.advance(state)
        self.ended[state] += 1
        del self._live[lease.lease_id]
        self._ended[lease.lease_id] = _Ended(reason, preempted)
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def expired(self, now: float) -> list[Lease]:
        """Leases whose time is up: nothing arrived for a TTL and no token stream is open."""
        return [lease for lease in self._live.values() if not lease.attached and now >= lease.expires_at]

    def superseded(self, request_id: str, attempt: int) -> list[Lease]:
        """Live leases of earlier attempts at the same request."""
        return [lease for lease in self._live.values() if lease.request_id == request_id and lease.attempt < attempt]

    def outdated(self, request_id: str, attempt: int) -> bool:
        """Whether a later attempt at the same request has a live lease."""
        return any(lease.request_id == request_id and lease.attempt > attempt for lease in self._live.values())
