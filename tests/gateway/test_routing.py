"""The policies: whom they prefer, when they give that up, and that what they remember stays bounded."""

from __future__ import annotations

import gc
import random
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from branchline.config import ROUTINGS, GatewayConfig
from branchline.core import Fingerprint
from gateway.pool import Pair
from gateway.routing import make_policy
from gateway.routing.load import LeastLoad, PowerOfTwo
from gateway.routing.policy import Demand, Policy, block_keys
from gateway.routing.prefix import PrefixAffinity
from gateway.routing.prefix_index import KnownBlocks
from gateway.routing.session import SessionAffinity
from gateway.worker import Role, Worker, WorkerStatus

SIZE = 4
Make = Callable[..., list[Worker]]


def status(incarnation: str = "i1", blocks: int = 100, requests: int = 0) -> WorkerStatus:
    return WorkerStatus(incarnation, Fingerprint({}), "m", 512, blocks, 0, requests, 0, "", 0)


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Worker] = []

    def workers(role: Role, count: int, first: int = 0, **of_status: int) -> list[Worker]:
        fresh = [Worker(role, f"10.0.0.{number}:1") for number in range(first, first + count)]
        for worker in fresh:
            worker.update(status(**of_status))
        made.extend(fresh)
        return fresh

    yield workers
    for worker in made:
        await worker.close()


@pytest.fixture
def pairs(make: Make) -> list[Pair]:
    """Of three workers on each side."""
    return all_pairs(make(Role.PREFILL, 3), make(Role.DECODE, 3))


def all_pairs(prefills: list[Worker], decodes: list[Worker]) -> list[Pair]:
    return [Pair(prefill, decode) for prefill in prefills for decode in decodes]


def sides(pairs: list[Pair]) -> tuple[list[Worker], list[Worker]]:
    return list(dict.fromkeys(p.prefill for p in pairs)), list(dict.fromkeys(p.decode for p in pairs))


def demand(*token_ids: int, session: str = "") -> Demand:
    return Demand(token_ids, session)


def place(policy: Policy, pairs: list[Pair], context: tuple[int, ...]) -> Pair:
    """What a gateway does for a request that is done before the next one comes."""
    wanted = Demand(context)
    pair = policy.order(pairs, wanted)[0]
    policy.placed(pair, wanted, 0)
    policy.has(pair.decode, context)
    return pair


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_policy_orders_all_pairs_and_those_that_failed_last(pairs: list[Pair], name: str) -> None:
    policy = make_policy(GatewayConfig(routing=name), SIZE)
    prefills, decodes = sides(pairs)
    for wanted in (demand(1, 2, 3), demand(1, 2, 3, session="s")):
        for bad_prefill, bad_decode in zip(prefills, decodes, strict=True):
            bad_prefill._avoid_until = bad_decode._avoid_until = float("inf")
            order = policy.order(pairs, wanted)
            assert Counter(order) == Counter(pairs)
            assert [pair.decode for pair in order[-3:]] == [bad_decode] * 3
            for decode in decodes:
                assert [pair.prefill for pair in order if pair.decode is decode][-1] is bad_prefill
            bad_prefill._avoid_until = bad_decode._avoid_until = 0.0


def test_least_load_counts_own_and_others_requests(pairs: list[Pair]) -> None:
    prefills, decodes = sides(pairs)
    decodes[0].in_flight, decodes[1].others = 2, 1
    prefills[0].others = 1
    order = LeastLoad().order(pairs, demand(1))
    assert [pair.decode for pair in order[::3]] == [decodes[2], decodes[1], decodes[0]]
    assert [pair.prefill for pair in order[:3]] == [prefills[1], prefills[2], prefills[0]]


def test_power_of_two_takes_the_better_one_of_two(pairs: list[Pair]) -> None:
    _, decodes = sides(pairs)
    for load, worker in enumerate(decodes):
        worker.in_flight = load
    policy = PowerOfTwo(random.Random(1))
    firsts = Counter(policy.order(pairs, demand(1))[0].decode for _ in range(300))
    assert firsts[decodes[2]] == 0, "the most loaded one is never the better one"
    assert firsts[decodes[0]] > firsts[decodes[1]] > 50


def test_a_session_stays_and_scaling_moves_few(make: Make) -> None:
    policy, names = SessionAffinity(), [f"session {number}" for number in range(200)]

    def homes(prefills: list[Worker], decodes: list[Worker]) -> list[tuple[str, str]]:
        firsts = [policy.order(all_pairs(prefills, decodes), demand(1, session=name))[0] for name in names]
        return [(pair.prefill.address, pair.decode.address) for pair in firsts]

    prefills, decodes = make(Role.PREFILL, 2), make(Role.DECODE, 5)
    before = homes(prefills, decodes)
    assert homes(prefills[::-1], decodes[::-1]) == before, "the order in which workers are known counts"
    after = homes(prefills, decodes[:4])
    gone = decodes[4].address
    assert all(new == old for old, new in zip(before, after, strict=True) if old[1] != gone)
    assert [decode for _, decode in after].count(gone) == 0
    shares = Counter(decode for _, decode in before)
    assert min(shares.values()) > 15, shares
    prefill_shares = Counter(prefill for prefill, _ in before)
    assert min(prefill_shares.values()) > 50, prefill_shares


def test_a_crowded_worker_loses_its_sessions_to_the_same_next_one(pairs: list[Pair]) -> None:
    policy, wanted = SessionAffinity(), demand(1, session="mine")
    _, decodes = sides(pairs)
    first, second, third = [pair.decode for pair in policy.order(pairs, wanted)[::3]]
    first.in_flight = 1
    assert policy.order(pairs, wanted)[0].decode is first, "two of three are no crowd"
    first.in_flight = 6
    assert [pair.decode for pair in policy.order(pairs, wanted)[::3]] == [second, third, first]
    assert policy.order(pairs, demand(1))[0].decode is not first
    for worker in decodes:
        worker.in_flight = 6
    assert policy.order(pairs, wanted)[0].decode is first, "all are equally busy"


def test_a_prefix_goes_where_it_is_known(pairs: list[Pair]) -> None:
    policy = PrefixAffinity(SIZE, 1000)
    contexts = [tuple(range(start, start + 32)) for start in (100, 200, 300)]
    homes = [place(policy, pairs, context) for context in contexts]
    assert len({pair.prefill for pair in homes}) == 3, "unrelated contexts spread over idle workers"
    for context, home in zip(contexts, homes, strict=True):
        again = policy.order(pairs, Demand((*context, 1, 2, 3, 4, 5)))[0]
        assert again.prefill is home.prefill
        assert again.decode is home.decode


def test_a_short_common_beginning_is_no_reason(pairs: list[Pair]) -> None:
    """What every chat's template begins with must not send all chats to one worker."""
    policy = PrefixAffinity(SIZE, 1000)
    homes = [place(policy, pairs, (*range(4), *range(start, start + 60))) for start in (100, 200, 300)]
    assert len({pair.prefill for pair in homes}) == 3


def test_no_hot_spot(pairs: list[Pair]) -> None:
    """A prefix is worth as many tokens as it has: with more of them waiting there, others compute it, too."""
    policy, context = PrefixAffinity(SIZE, 1000), tuple(range(40))
    home = place(policy, pairs, context).prefill
    home.waiting_tokens = 30
    assert policy.order(pairs, demand(*context, 1))[0].prefill is home
    home.waiting_tokens = 60
    other = place(policy, pairs, (*context, 1)).prefill
    assert other is not home
    assert policy.order(pairs, demand(*context, 2))[0].prefill is other, "now it is known there, too"


def test_what_waits_at_other_gateways_counts(pairs: list[Pair]) -> None:
    policy, context = PrefixAffinity(SIZE, 1000), tuple(range(40))
    for start in range(1000, 9000, 100):
        place(policy, pairs, tuple(range(start, start + 20)))
    home = place(policy, pairs, context).prefill
    home.others = 1
    assert policy.order(pairs, demand(*context, 1))[0].prefill is home
    home.others = 3
    assert policy.order(pairs, demand(*context, 1))[0].prefill is not home


def test_a_decode_worker_with_more_than_its_share_is_not_preferred(pairs: list[Pair]) -> None:
    policy, context = PrefixAffinity(SIZE, 1000), tuple(range(40))
    home = place(policy, pairs, context).decode
    home.in_flight = 1
    assert policy.order(pairs, demand(*context, 1))[0].decode is home
    home.in_flight = 4
    assert policy.order(pairs, demand(*context, 1))[-1].decode is home


def test_a_worker_that_restarted_or_left_is_forgotten(make: Make) -> None:
    policy, context = PrefixAffinity(SIZE, 1000), tuple(range(40))
    prefills, decodes = make(Role.PREFILL, 2), make(Role.DECODE, 1)
    home = place(policy, all_pairs(prefills, decodes), context).prefill
    assert len(policy.index) == 20
    home.update(status(incarnation="i2"))
    (other,) = set(prefills) - {home}
    home.others, other.others = 0, 0
    policy.placed(Pair(other, decodes[0]), Demand(context), 40)
    assert policy.order(all_pairs(prefills, decodes), demand(*context, 1))[0].prefill is other
    assert len(policy.index.of(home)) == 0
    lone = PrefixAffinity(SIZE, 1000)
    passing = Worker(Role.DECODE, "10.0.0.9:1")
    passing.update(status())
    lone.has(passing, context)
    assert len(lone.index) == 10
    del passing
    gc.collect()
    assert len(lone.index) == 0


def test_a_worker_that_caches_nothing_is_found_out(pairs: list[Pair]) -> None:
    """Its prefixes are worth nothing then, and only what waits counts."""
    policy, context = PrefixAffinity(SIZE, 1000), tuple(range(40))
    home = place(policy, pairs, context).prefill
    for _ in range(60):
        forecast = policy.placed(Pair(home, pairs[0].decode), Demand(context), 0)
        assert forecast.cached == 36, "one token at least is left to compute"
        policy.computed(home, forecast, cached_tokens=0)
    assert forecast.computed == 40
    home.waiting_tokens = 6
    assert policy.order(pairs, demand(*context, 1))[0].prefill is not home
    for _ in range(60):
        policy.computed(home, forecast, cached_tokens=36)
    assert policy.order(pairs, demand(*context, 1))[0].prefill is home


def test_no_more_is_remembered_than_a_worker_has(make: Make) -> None:
    policy = PrefixAffinity(SIZE, 8)
    (small,), (large,) = make(Role.DECODE, 1, blocks=3), make(Role.DECODE, 1, first=1, blocks=100)
    for worker in (small, large):
        policy.has(worker, tuple(range(100)))
    assert (len(policy.index.of(small)), len(policy.index.of(large))) == (3, 8)


def test_keys_follow_the_whole_beginning() -> None:
    tokens = tuple(range(11))
    keys = block_keys(tokens, SIZE)
    assert len(keys) == 2
    assert block_keys((*tokens, 5), SIZE)[:2] == keys
    assert not set(block_keys((7, *tokens[1:]), SIZE)) & set(keys)


class KnownBlocksMachine(RuleBasedStateMachine):
    """Against chains written out: a block is known by all that stands in front of it."""

    contexts = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)

    @initialize(capacity=st.integers(1, 12))
    def begin(self, capacity: int) -> None:
        self.known = KnownBlocks("i1", capacity)
        self.model: OrderedDict[tuple[int, ...], None] = OrderedDict()  # the latest last

    @rule(context=contexts)
    def add(self, context: tuple[int, ...]) -> None:
        self.known.add(block_keys(context, 1))
        for end in range(min(len(context), self.known.capacity), 0, -1):
            self.model[context[:end]] = None
            self.model.move_to_end(context[:end])
        while len(self.model) > self.known.capacity:
            self.model.popitem(last=False)

    @rule(context=contexts)
    def match(self, context: tuple[int, ...]) -> None:
        found = self.known.match(block_keys(context, 1))
        longest = next((end for end in range(len(context), 0, -1) if context[:end] in self.model), 0)
        assert found == longest, "what is known is known from its beginning"

    @rule(expected=st.integers(0, 50), found=st.integers(0, 80))
    def observe(self, expected: int, found: int) -> None:
        self.known.observe(expected, found)
        assert 0.0 <= self.known.trust <= 1.0

    @invariant()
    def is_bounded(self) -> None:
        assert len(self.known) == len(self.model) <= self.known.capacity


TestKnownBlocks = KnownBlocksMachine.TestCase
TestKnownBlocks.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
