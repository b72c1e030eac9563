"""Admission, preemption and samples in the real engine loop, under any order of events."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from scheduling_world import MAX_LEN, SLOTS, Group, Sequence, World, load, new_loop

from branchline.core import InvalidRequestError
from branchline.engine.blocks import OutOfBlocksError
from branchline.engine.models.protocol import Models
from decode_worker.admission import Reservation, rank_of

pytestmark = pytest.mark.models

PICK = st.integers(0, 9)
#: More iterations than the tokens of everything that a run of the machine can ask for.
DRAIN_STEPS = 3000


@dataclass(frozen=True)
class Ask:
    length: int
    max_tokens: int
    samples: int
    priority: int
    queued_s: float
    keeps: bool


ASKS = st.builds(
    Ask,
    length=st.integers(1, 30),
    max_tokens=st.integers(1, 24),
    samples=st.sampled_from([1, 1, 1, 2, 3, SLOTS]),
    priority=st.sampled_from([-2, 0, 0, 0, 1, 5]),
    queued_s=st.sampled_from([0.0, 0.0, 3.5, 60.0]),
    keeps=st.booleans(),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return load(tmp_path_factory.mktemp("scheduling"))


class SchedulingMachine(RuleBasedStateMachine):
    """Everybody who can do something to the engine does so at any time."""

    def __init__(self, models: Models, pipelined: bool, reused: list[int]) -> None:
        super().__init__()
        self.world = World(new_loop(models, pipelined))
        self.reused = reused

    @rule(asks=st.lists(ASKS, min_size=1, max_size=4), wait=st.sampled_from([True, True, False]))
    def reserve(self, asks: list[Ask], wait: bool) -> None:
        for ask in asks:
            self._reserve(ask, wait)

    @rule(pick=PICK, with_draft=st.booleans())
    def receive(self, pick: int, with_draft: bool) -> None:
        if (group := self._pick([one for one in self.world.granted if not one.imported], pick)) is not None:
            self.world.import_kv(group, with_draft)

    @rule(pick=PICK)
    def commit(self, pick: int) -> None:
        ready = [one for one in self.world.granted if one.imported and not one.shared]
        if (group := self._pick(ready, pick)) is not None:
            self.world.share(group)

    @rule(pick=PICK, with_draft=st.booleans())
    def start(self, pick: int, with_draft: bool) -> None:
        shared = [group for group in self.world.granted if group.shared]
        idle = [(group, one) for group in shared for one in group.live if not one.started]
        if idle:
            self.world.start(*idle[pick % len(idle)], with_draft)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.check()

    @rule(pick=PICK)
    def abort(self, pick: int) -> None:
        live = [(group, one) for group in self.world.granted for one in group.live]
        if live:
            self.world.end(*live[pick % len(live)])

    @rule(pick=PICK)
    def stop_waiting(self, pick: int) -> None:
        if (group := self._pick(self.world.waiting, pick)) is not None:
            self.world.withdraw(group)

    @rule(pick=PICK)
    def stop_waiting_too_late(self, pick: int) -> None:
        """In the moment in which it was granted."""
        if (group := self._pick([one for one in self.world.granted if not one.imported], pick)) is not None:
            self.world.withdraw(group)

    @rule()
    def come_back(self) -> None:
        self.world.come_back()

    @invariant()
    def books_agree(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """Nobody starves: what nobody has aborted ends, with all its tokens; then nothing is left."""
        drain(self.world)
        self.reused.append(self.world.reused)
        super().teardown()

    def _reserve(self, ask: Ask, wait: bool) -> None:
        world = self.world
        world.now += 1.0
        rank = rank_of(world.now, ask.queued_s, ask.priority)
        lease_ids = world.new_lease_ids(ask.samples)
        sequences = [Sequence(ask.length, ask.max_tokens, sample) for sample in range(ask.samples)]
        keys = world.loop.runner.keys(sequences[0].request().context) if ask.keeps else None
        reservation = Reservation(lease_ids, ask.length, ask.length + ask.max_tokens, rank, ask.priority, keys)
        before = world.loop.runner.pool.used
        try:
            world.reserve(reservation, sequences, wait)
        except OutOfBlocksError:
            assert not wait
            assert world.loop.runner.pool.used == before
        except InvalidRequestError:
            assert ask.samples > 1, "what fits alone is refused"

    @staticmethod
    def _pick(groups: list[Group], pick: int) -> Group | None:
        return groups[pick % len(groups)] if groups else None


def drain(world: World) -> None:
    for _ in range(DRAIN_STEPS):
        world.come_back()
        for group in list(world.granted):
            if not group.imported and group.live:
                world.import_kv(group, with_draft=True)
            if not group.shared and group.live:
                world.share(group)
            for sequence in group.live:
                if not sequence.started:
                    world.start(group, sequence, with_draft=True)
        world.check()
        if not world.step() and not (world.waiting or world.granted or world.preempted):
            break
    assert [*world.waiting, *world.granted, *world.preempted] == [], "somebody starves"
    world.loop.close()
    assert world.loop.runner.pool.used == len(world.loop.runner.live) == 0


@pytest.mark.parametrize("pipelined", [False, True])
def test_whatever_happens_the_books_agree_and_nobody_starves(models: Models, pipelined: bool) -> None:
    reused: list[int] = []
    run_state_machine_as_test(
        lambda: SchedulingMachine(models, pipelined, reused),
        settings=settings(
            max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
    assert sum(reused) > 0, "nothing was ever reused"


@pytest.mark.parametrize("pipelined", [False, True])
def test_sequences_that_outgrow_the_cache_take_turns(models: Models, pipelined: bool) -> None:
    """Each of them fits alone; together they need more blocks than there are, and all get their tokens."""
    world = World(new_loop(models, pipelined))
    for number in range(6):
        ids = world.new_lease_ids(1)
        world.reserve(Reservation(ids, 8, MAX_LEN, rank=float(number)), [Sequence(8, MAX_LEN - 8, 0)])
    drain(world)
    assert world.preemptions > 0
