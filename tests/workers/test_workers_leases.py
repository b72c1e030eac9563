"""The lease's states, with real blocks, under any order of events; and its time to live."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from branchline.engine.blocks import BlockPool, OutOfBlocksError, blocks_for
from decode_worker.leases import _NEXT, Lease, LeaseEndedError, LeaseState, LeaseTable, UnknownLeaseError

LEASES = st.integers(0, 30)


def new_lease(table: LeaseTable, request_id: str, attempt: int, *, now: float, length: int = 8) -> Lease:
    [lease_id] = table.new_ids(attempt, 1)
    lease = Lease(lease_id, request_id, attempt, length - 1, length, True, expires_at=now + table.ttl_s)
    table.add(lease)
    return lease


class LeaseMachine(RuleBasedStateMachine):
    """Blocks follow leases: taken at creation, given back at the end, whatever happens in between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable("incarnation", ttl_s=5.0)
        self.pool = BlockPool(12)
        self.blocks: dict[str, list[int]] = {}
        self.made: list[Lease] = []
        self.now = 0.0

    @rule(length=st.integers(2, 100), attempt=st.integers(1, 3))
    def reserve(self, length: int, attempt: int) -> None:
        try:
            blocks = self.pool.allocate(blocks_for(length, 16))
        except OutOfBlocksError:
            return
        lease = new_lease(self.table, "request", attempt, now=self.now, length=length)
        assert lease.lease_id not in self.blocks
        self.blocks[lease.lease_id] = blocks
        self.made.append(lease)

    @rule(number=LEASES)
    def attach(self, number: int) -> None:
        if number < len(self.made) and not self.made[number].state.ended:
            self.made[number].attached = True

    @rule(number=LEASES, state=st.sampled_from(LeaseState))
    def advance(self, number: int, state: LeaseState) -> None:
        if number >= len(self.made):
            return
        lease = self.made[number]
        legal = state in _NEXT[lease.state] and (state is not LeaseState.RUNNING or lease.attached)
        before = lease.state
        if not legal:
            with pytest.raises(AssertionError):
                lease.advance(state)
            assert lease.state is before
        elif state.ended:
            self._end(lease, state)
        else:
            lease.advance(state)

    @rule(number=LEASES)
    def frame_arrives(self, number: int) -> None:
        if number < len(self.made) and not self.made[number].state.ended:
            self.table.touch(self.made[number], self.now)
            assert self.made[number].expires_at >= self.now + 5.0

    @rule(seconds=st.floats(0.0, 6.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for lease in self.table.expired(self.now):
            assert not lease.attached
            self._end(lease, LeaseState.ABORTED)

    def _end(self, lease: Lease, state: LeaseState) -> None:
        self.table.end(lease, state, "because")
        self.pool.release(self.blocks.pop(lease.lease_id))
        with pytest.raises(LeaseEndedError, match="because"):
            self.table.get(lease.lease_id)

    @invariant()
    def live_leases_hold_the_blocks(self) -> None:
        self.pool.check_integrity()
        assert {lease.lease_id for lease in self.table.live()} == set(self.blocks)
        assert len(self.table) == sum(not lease.state.ended for lease in self.made)
        assert self.pool.used == sum(map(len, self.blocks.values()))


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable("f00d", ttl_s=10.0)


def test_an_unused_lease_expires_after_its_ttl(table: LeaseTable) -> None:
    lease = new_lease(table, "a", 1, now=100.0)
    assert table.expired(109.9) == []
    assert table.expired(110.0) == [lease]


def test_what_arrives_prolongs_the_lease_and_an_open_stream_holds_it(table: LeaseTable) -> None:
    lease = new_lease(table, "a", 1, now=100.0)
    table.touch(lease, 107.0)
    assert table.expired(116.0) == []
    assert table.expired(117.0) == [lease]
    lease.attached = True
    assert table.expired(1e9) == []


def test_ids_carry_incarnation_and_attempt_and_those_of_others_are_unknown(table: LeaseTable) -> None:
    assert new_lease(table, "a", 7, now=0.0).lease_id == "f00d.7.1"
    other = new_lease(LeaseTable("beef", ttl_s=10.0), "a", 7, now=0.0)
    with pytest.raises(UnknownLeaseError):
        table.get(other.lease_id)


def test_attempts_at_one_request_are_told_apart(table: LeaseTable) -> None:
    first = new_lease(table, "a", 1, now=0.0)
    second = new_lease(table, "a", 2, now=0.0)
    new_lease(table, "b", 1, now=0.0)
    assert table.superseded("a", 2) == [first]
    assert table.superseded("a", 3) == [first, second]
    assert table.outdated("a", 1)
    assert not table.outdated("a", 2)


def test_samples_get_ids_of_their_own_and_a_preemption_is_remembered(table: LeaseTable) -> None:
    assert table.new_ids(2, 3) == ("f00d.2.1", "f00d.2.2", "f00d.2.3")
    taken, aborted = (new_lease(table, "a", 1, now=0.0) for _ in range(2))
    table.end(taken, LeaseState.ABORTED, "because", preempted=True)
    table.end(aborted, LeaseState.ABORTED, "because")
    assert table.was_preempted(taken.lease_id)
    assert not table.was_preempted(aborted.lease_id)
    assert not table.was_preempted("unknown")
