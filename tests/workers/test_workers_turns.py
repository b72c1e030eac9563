"""The order of admission, and who is given up for whom, as rules on numbers."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from decode_worker.admission import AdmissionQueue, Reservation, rank_of, victims


@dataclass(frozen=True)
class Holder:
    name: int
    rank: float
    priority: int
    blocks: int


def reservation(rank: float, priority: int = 0, name: str = "lease") -> Reservation:
    return Reservation((name,), 4, 8, rank, priority)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12))
def test_the_queue_is_by_rank_then_first_come_whoever_leaves(arrivals: list[tuple[int, bool]]) -> None:
    queue = AdmissionQueue()
    asked = [reservation(float(rank), name=str(number)) for number, (rank, _) in enumerate(arrivals)]
    for one in asked:
        queue.add(one)
    gone = [one for one, (_, leaves) in zip(asked, arrivals, strict=True) if leaves]
    assert [queue.withdraw(one) for one in gone] == [True] * len(gone)
    assert not any(queue.withdraw(one) for one in gone)
    left = sorted((one for one in asked if one not in gone), key=lambda one: one.rank)  # stable
    assert len(queue) == len(left)
    for one in left:
        assert queue.head is one
        assert queue.pop() is one
    assert queue.head is None


def test_a_level_of_priority_is_worth_ten_seconds() -> None:
    assert rank_of(now=100.0, queued_s=30.0, priority=0) == rank_of(now=100.0, queued_s=0.0, priority=3) == 70.0
    assert rank_of(now=100.0, queued_s=0.0, priority=-2) == 120.0


HOLDERS = st.lists(
    st.builds(Holder, st.integers(), st.integers(0, 6).map(float), st.integers(0, 2), st.integers(1, 4)),
    max_size=6,
    unique_by=lambda one: one.name,
)


@given(holders=HOLDERS, rank=st.integers(0, 6), priority=st.integers(0, 3), needed=st.integers(1, 8))
def test_the_fewest_of_the_worst_are_given_up_or_nobody(
    holders: list[Holder], rank: int, priority: int, needed: int
) -> None:
    def fits(gone: Collection[Holder]) -> bool:
        return sum(one.blocks for one in gone) >= needed

    chosen = victims(reservation(float(rank), priority), holders, lambda one: [one], fits)
    allowed = [one for one in holders if one.priority < priority and one.rank > rank]
    assert set(chosen) <= set(allowed)
    if not fits(allowed):
        assert chosen == []
        return
    assert fits(chosen)
    assert not fits(chosen[:-1])
    for given_up, kept in itertools.product(chosen, set(allowed) - set(chosen)):
        assert given_up.rank >= kept.rank


def test_what_belongs_together_goes_together() -> None:
    holders = [Holder(number, 5.0, 0, 1) for number in range(3)]
    chosen = victims(reservation(1.0, 1), holders, lambda _: holders, lambda gone: len(gone) >= 1)
    assert chosen == holders
