"""Prefill to decode over real gRPC: the tokens, and what happens when the hand-off goes wrong."""

from __future__ import annotations

import asyncio
import random

import pytest
from worker_driver import Driver, Tiny

from branchline.v1 import types_pb2

pytestmark = pytest.mark.wire


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(80) for _ in range(length))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 70])
async def test_tokens_are_those_of_plain_greedy_decoding(workers: Driver, tiny: Tiny, length: int) -> None:
    outcome = await workers.complete(workers.request(prompt(length), 24))
    assert tuple(outcome.token_ids) == tiny.greedy(prompt(length), 24)
    assert outcome.finish == types_pb2.FINISH_REASON_LENGTH
    assert outcome.speculation.accepted + outcome.speculation.target_forwards == 23
    assert outcome.speculation.drafted > 0


async def test_requests_at_once(workers: Driver, tiny: Tiny) -> None:
    prompts = [prompt(10 + 9 * seed, seed) for seed in range(4)]
    outcomes = await asyncio.gather(*(workers.complete(workers.request(one, 20)) for one in prompts))
    assert [tuple(outcome.token_ids) for outcome in outcomes] == [tiny.greedy(one, 20) for one in prompts]
