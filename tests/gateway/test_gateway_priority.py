"""Who is served first when room is short, and what happens to those whose room is taken back."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest
from gateway_harness import PROMPT, house
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually, expected_tokens

from branchline.core import Request
from branchline.wire.status import RpcFailure
from gateway.placement import Search
from gateway.tokens import Tokens
from gateway.turns import Turns

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

Code = grpc.StatusCode


class TestTurns:
    async def test_served_by_rank_then_by_age(self) -> None:
        turns, served = Turns(), []

        async def one(name: str, rank: float) -> None:
            with turns.join(rank) as turn:
                await turn.mine()
                served.append(name)
                await asyncio.sleep(0)

        with turns.join(-100.0):
            tasks = [asyncio.create_task(one(name, rank)) for name, rank in [("b", 2), ("c", 2), ("a", 1), ("d", 3)]]
            await asyncio.sleep(0.01)
            assert served == []
        await asyncio.gather(*tasks)
        assert served == ["a", "b", "c", "d"]
        assert len(turns) == 0

    async def test_one_who_gives_up_holds_nobody_up(self) -> None:
        turns = Turns()

        async def wait(rank: float) -> float:
            with turns.join(rank) as turn:
                await turn.mine()
                return rank

        with turns.join(0.0):
            tasks = [asyncio.create_task(wait(rank)) for rank in (1.0, 2.0, 3.0)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            await asyncio.sleep(0)
        assert await asyncio.gather(*tasks[1:]) == [2.0, 3.0]
        assert len(turns) == 0

    async def test_the_first_gives_way_to_a_better_one(self) -> None:
        turns = Turns()
        with turns.join(1.0) as first:
            await asyncio.wait_for(first.mine(), 1)
            assert turns.first(0.5)
            assert not turns.first(1.0)  # of equals the one that came first
            with turns.join(0.5) as better:
                await asyncio.wait_for(better.mine(), 1)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(first.mine(), 0.01)
            await asyncio.wait_for(first.mine(), 1)

    async def test_exactly_one_is_first_whoever_comes_and_goes(self) -> None:
        turns, dice, open_places = Turns(), random.Random(1), []
        for _ in range(300):
            if open_places and dice.random() < 0.5:
                place, _ = open_places.pop(dice.randrange(len(open_places)))
                place.__exit__(None, None, None)
            else:
                place = turns.join(dice.randrange(5))
                open_places.append((place, place.__enter__()))
            firsts = [turn for _, turn in open_places if turn.is_first.is_set()]
            assert firsts == [min(turn for _, turn in open_places)] if open_places else not firsts
        for place, _ in open_places:
            place.__exit__(None, None, None)


def test_a_level_of_priority_is_worth_ten_seconds() -> None:
    """So nobody waits for ever: whoever came 10 s before a level 1 is served before it."""
    request = Request(request_id="r", prompt=(1,), max_tokens=1)

    def rank(arrived: float, priority: int) -> float:
        return Search("r", request, arrived=arrived, until=0.0, priority=priority).rank

    assert rank(100.0, 0) < rank(109.0, 0)
    assert rank(109.0, 1) < rank(100.0, 0) < rank(111.0, 1)
    assert rank(100.0, -2) > rank(119.0, 0)


async def test_what_a_reservation_says(tokens: Tokens) -> None:
    decode = ScriptedDecode(refusals=[RpcFailure(Code.RESOURCE_EXHAUSTED, "no slot")] * 2)
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        await h.complete(4, priority=-7)
        first, second, third = decode.reservations[:3]
        assert {reservation.priority for reservation in decode.reservations} == {-7}
        assert (first.wait_ms, second.wait_ms) == (0, 0)  # whoever has room is asked first
        assert third.wait_ms == 1000
        assert first.queued_ms <= second.queued_ms <= third.queued_ms < 10_000


async def test_no_call_waits_beyond_the_deadline(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(capacity=0)], request_timeout_s=0.7) as h:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await h.answer(4, timeout=None)
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        assert max(reservation.wait_ms for reservation in h.decodes[0].reservations) <= 700
        await h.idle()
        assert not h.decodes[0].leases


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_while_it_waits_for_room(tokens: Tokens, n: int) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(capacity=0)]) as h:
        call = h.call(4, n=n)
        await eventually(lambda: h.decodes[0].waiting)
        call.cancel()
        h.decodes[0].capacity = 100
        await h.complete(4)
        await h.idle()
        assert not h.decodes[0].leases


async def test_higher_priorities_first_then_age(tokens: Tokens) -> None:
    decode = ScriptedDecode(capacity=1, pace_s=0.01)
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        holder = h.call(60)
        await holder.read()
        ended: list[str] = []

        async def one(name: str, priority: int) -> None:
            await h.complete(4, priority=priority)
            ended.append(name)

        tasks = []
        for name, priority in [("low", -3), ("first", 0), ("second", 0), ("high", 1), ("highest", 100)]:
            tasks.append(asyncio.create_task(one(name, priority)))
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        holder.cancel()
        await asyncio.gather(*tasks)
        assert ended == ["highest", "high", "first", "second", "low"]
        await h.idle()


async def test_only_the_first_asks(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(capacity=0)], request_timeout_s=1.5) as h:
        calls = [h.call(4, timeout=None) for _ in range(20)]
        await eventually(lambda: h.desk.door.active_requests == 20)
        await asyncio.sleep(0.5)
        assert 1 <= len(h.decodes[0].reservations) <= 25  # each once at most, and the first a few times
        assert len(h.decodes[0].waiting) == 1
        for call in calls:
            call.cancel()
        await h.idle()


async def test_age_counts_from_the_clients_request_on(tokens: Tokens) -> None:
    """Over all attempts: whoever was thrown out goes on before those that came later."""
    decode = ScriptedDecode(preempting=1, pace_s=0.05)
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        await h.complete(8)
        first, second = decode.reservations
        assert first.queued_ms < 100
        assert second.queued_ms >= 150  # three tokens later
        assert (first.attempt, second.attempt) == (1, 2)


async def test_room_elsewhere_is_found_while_waiting(tokens: Tokens) -> None:
    decodes = [ScriptedDecode(capacity=1, pace_s=0.05), ScriptedDecode(capacity=1, pace_s=0.05)]
    async with house(tokens, [ScriptedPrefill()], decodes) as h:
        holders = {}
        for _ in decodes:
            call = h.call(200)
            await call.read()
            holders[next(index for index, d in enumerate(decodes) if d.leases and index not in holders)] = call
        task = asyncio.create_task(h.complete(4))
        await eventually(lambda: any(decode.waiting for decode in decodes))
        elsewhere = next(index for index, decode in enumerate(decodes) if not decode.waiting)
        holders[elsewhere].cancel()
        await asyncio.wait_for(task, 1.5)
        assert decodes[elsewhere].reserved == 2
        holders[1 - elsewhere].cancel()
        await h.idle()


async def test_preempted_requests_go_on(tokens: Tokens) -> None:
    decode = ScriptedDecode(preempting=6)
    async with house(tokens, [ScriptedPrefill()], [decode], max_attempts=1) as h:
        answer = await h.complete(30)
        assert (answer.finished.preemptions, answer.finished.failovers) == (6, 0)
        assert [len(request.emitted) for request in h.prefills[0].requests] == [0, 3, 6, 9, 12, 15, 18]
        assert answer.finished.speculation.target_forwards == 6 * 2 + 11  # of all attempts
        assert not any(worker.avoided for worker in h.backend.pool.workers)  # no worker is to blame
        await h.idle()


async def test_preemption_and_failure_are_counted_apart(tokens: Tokens) -> None:
    decode = ScriptedDecode(preempting=1, after=3)
    prefill = ScriptedPrefill(failures=[None, RpcFailure(Code.ABORTED, "scripted")])
    async with house(tokens, [prefill], [decode], max_attempts=2) as h:
        answer = await h.complete(8)
        assert (answer.finished.preemptions, answer.finished.failovers) == (1, 1)


@pytest.mark.parametrize("n", [1, 3])
async def test_preempted_during_the_hand_off(tokens: Tokens, n: int) -> None:
    """Both workers report it, in any order; it is no failure of anybody's. The first tokens have been delivered."""
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(preempt_hand_offs=2)], max_attempts=1) as h:
        answers = await h.complete_all(n, 6)
        assert sum(answer.finished.preemptions for answer in answers) >= 2
        assert {answer.finished.failovers for answer in answers} == {0}
        await h.idle()


@pytest.mark.parametrize("n", [1, 3])
async def test_preempted_before_the_hand_off(tokens: Tokens, n: int) -> None:
    """Perhaps even before the other samples' streams are open."""
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(preempt_streams=n)], max_attempts=1) as h:
        answers = await h.complete_all(n, 6)
        assert all(answer.finished.preemptions >= 1 for answer in answers)
        assert {answer.finished.failovers for answer in answers} == {0}
        assert not any(worker.avoided for worker in h.backend.pool.workers)
        await h.idle()


async def test_preempted_samples_go_on_alone(tokens: Tokens) -> None:
    decode = ScriptedDecode(preempting=1, failing_sample=1)
    async with house(tokens, [ScriptedPrefill()], [decode], max_attempts=1) as h:
        answers = await h.complete_all(3, 10)
        assert [answer.finished.preemptions for answer in answers] == [0, 1, 0]
        await h.idle()


async def test_preempted_with_the_last_token_sent(tokens: Tokens) -> None:
    decode = ScriptedDecode(preempting=1)
    original = decode._tokens

    async def cut(request):
        async for response in original(request):
            yield response
            if response.WhichOneof("event") == "preempted":
                return

    decode._tokens = cut
    async with house(tokens, [ScriptedPrefill()], [decode], max_attempts=1) as h:
        answer = await h.answer(3)
        assert answer.token_ids == expected_tokens(PROMPT, 3)
        await h.idle()
