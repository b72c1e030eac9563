"""A prompt that begins like an earlier one: nothing of it is computed twice, and all of it is handed off."""

from __future__ import annotations

import asyncio

import pytest
from worker_driver import Driver, Tiny, running_workers

pytestmark = pytest.mark.wire

BLOCK = 16


async def cached_tokens(workers: Driver, prompt: tuple[int, ...]) -> int:
    """What the prefill worker says that it found; the request goes no further than its first token."""
    request = workers.request(prompt, 1)
    lease = await workers.reserve(request)
    [event] = [event async for event in workers.start_prefill(request, lease)]
    await workers.abort(lease)
    return event.first_token.cached_tokens


async def test_a_second_turn_computes_only_what_is_new(workers: Driver, tiny: Tiny) -> None:
    prompt = tuple((7 * index + index**2) % 80 for index in range(70))
    first = await workers.complete(workers.request(prompt, 30))
    assert tuple(first.token_ids) == tiny.greedy(prompt, 30)
    before = (await workers.status())[0].prefilled_tokens
    turn = (*prompt, *first.token_ids, 5, 6, 7)
    second = await workers.complete(workers.request(turn, 30))
    assert tuple(second.token_ids) == tiny.greedy(turn, 30)
    assert (await workers.status())[0].prefilled_tokens == before + len(turn) - len(prompt) // BLOCK * BLOCK
    assert await cached_tokens(workers, turn) == len(turn) // BLOCK * BLOCK
    await workers.wait_until_idle()  # what is only cached counts as free


async def test_samples_of_a_cached_prompt(workers: Driver, tiny: Tiny) -> None:
    prompt = tuple((3 * index + index**2) % 80 for index in range(3 * BLOCK))
    greedy = tiny.greedy(prompt, 12)
    for cached in (0, 2 * BLOCK):
        assert await cached_tokens(workers, prompt) == cached
        outcomes = await workers.complete_samples(workers.request(prompt, 12), 3)
        assert [tuple(outcome.token_ids) for outcome in outcomes] == [greedy] * 3


async def test_many_at_once_are_computed_once(workers: Driver, tiny: Tiny) -> None:
    prompt = tuple((5 * index + index**2) % 80 for index in range(100))
    greedy = tiny.greedy(prompt, 8)
    outcomes = await asyncio.gather(*(workers.complete(workers.request(prompt, 8)) for _ in range(4)))
    assert [tuple(outcome.token_ids) for outcome in outcomes] == [greedy] * 4
    assert (await workers.status())[0].prefilled_tokens == 100 + 3 * (100 - 100 // BLOCK * BLOCK)


async def test_prefix_caching_can_be_switched_off(tiny: Tiny) -> None:
    prompt = tuple(range(40))
    async with running_workers(tiny.config(**{"engine.prefix_caching": False})) as workers:
        assert [await cached_tokens(workers, prompt) for _ in range(2)] == [0, 0]
        await workers.wait_until_idle()
