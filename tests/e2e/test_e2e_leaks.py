"""Nothing is left over: after many requests with cancellations anywhere, and within a second of each one."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from e2e_helpers import REQUEST_S, Fleet, Options, in_use, wait_until, wait_until_idle

from branchline.client import Client, ServerInfo

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

REQUESTS, THREADS, MAX_TOKENS = 200, 12, 48
#: A client that goes away frees its blocks on both sides within this time.
FREED_S = 1.0


@dataclass(frozen=True)
class Plan:
    """One request; `chunks` and `seconds` say when it is cancelled, None never."""

    kind: int
    max_tokens: int
    chunks: int | None = None
    seconds: float = 0.0


def kinds() -> list[Options]:
    """Short and long prompts, greedy and sampled."""
    prompts = ["a", "a bad cab", "fade a lamb " * 10, "in a dimmed den " * 40]
    greedy: list[Options] = [{"prompt": prompt, "ignore_eos": True} for prompt in prompts]
    return greedy + [options | {"temperature": 0.8, "top_k": 12, "seed": 5} for options in greedy]


def plans() -> list[Plan]:
    """Every third one is cancelled: before its first chunk, or after a few of them."""
    draw = random.Random(11)
    plans = []
    for number in range(REQUESTS):
        plan = Plan(draw.randrange(len(kinds())), draw.randrange(1, MAX_TOKENS + 1))
        if number % 3 == 0:
            early = draw.random() < 0.5
            plan = Plan(plan.kind, MAX_TOKENS, 0 if early else draw.randrange(1, 16), draw.random() * 0.15)
        plans.append(plan)
    return plans


def run(client: Client, plan: Plan) -> list[int]:
    """The tokens up to the end or the cancellation."""
    token_ids: list[int] = []
    options = kinds()[plan.kind] | {"max_tokens": plan.max_tokens}
    with client.generate(timeout=REQUEST_S, **options) as stream:
        if plan.chunks == 0:
            time.sleep(plan.seconds)
            return token_ids
        for number, chunk in enumerate(stream, 1):
            token_ids += chunk.token_ids
            if number == plan.chunks:
                break
    return token_ids


def test_two_hundred_requests_with_a_third_cancelled(one_of_each: Fleet) -> None:
    client = one_of_each.client
    whole = [run(client, Plan(kind, MAX_TOKENS)) for kind in range(len(kinds()))]
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(lambda plan: run(client, plan), plans()))
    for plan, token_ids in zip(plans(), got, strict=True):
        expected = whole[plan.kind][: plan.max_tokens if plan.chunks is None else len(token_ids)]
        assert token_ids == expected, plan
    wait_until_idle(client, FREED_S)
    assert len(client.info().workers) == 2
    assert all(worker.healthy and worker.blocks_total for worker in client.info().workers)
    assert run(client, Plan(1, MAX_TOKENS)) == whole[1]


def test_a_client_that_goes_away_in_mid_stream(one_of_each: Fleet) -> None:
    client = one_of_each.client
    with client.generate(prompt="a bad cab", max_tokens=1900, ignore_eos=True, timeout=REQUEST_S) as stream:
        for _, _ in zip(range(5), stream, strict=False):
            pass
        assert [worker.role for worker in in_use(client.info())] == ["decode"]
    assert freed_after(client) < FREED_S


def test_clients_that_go_away_while_prompts_are_computed(one_of_each: Fleet) -> None:
    """Their blocks on the prefill worker, those waiting to be filled on the decode worker, and the queue."""
    client = one_of_each.client
    prompt = "fade a lamb in a dimmed den " * 70
    streams = [client.generate(prompt=prompt, max_tokens=8, timeout=REQUEST_S) for _ in range(12)]
    wait_until(lambda: {w.role for w in in_use(client.info()) if w.blocks_used} == {"prefill", "decode"}, 10, "begun")
    for stream in streams:
        stream.close()
    assert freed_after(client) < FREED_S


def freed_after(client: Client) -> float:
    """Seconds from now until nothing is in use any more."""
    began = time.monotonic()
    info: ServerInfo = client.info()
    while info.active_requests or in_use(info):
        assert time.monotonic() - began < 10 * FREED_S, info
        info = client.info()
    return time.monotonic() - began
