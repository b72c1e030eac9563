"""More work than fits: requests wait for room, in order, and are told when their time is up."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2e_helpers import REQUEST_S, Fleet, Streamed, complete_all, running_fleet, wait_until, wait_until_idle
from e2e_model import TinyModel

from branchline.client import AsyncClient, DeadlineExceededError, OverloadedError

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

LARGE = {"prompt": "a bad cab " * 80, "max_tokens": 400, "ignore_eos": True}
#: Together with a large one its prompt alone is too much; they share no beginning.
HUGE = {"prompt": "cab a bad " * 190, "max_tokens": 100, "ignore_eos": True}
SMALL = {"prompt": "fade a lamb", "max_tokens": 30, "ignore_eos": True}


@pytest.fixture(scope="module")
def fleet(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Blocks for two large requests at a time."""
    config = tiny.config(**{"engine.kv_cache_mib": 3})
    with running_fleet(config, tmp_path_factory.mktemp("fleet")) as fleet:
        assert all(75 * 2 <= worker.blocks_total < 75 * 3 for worker in fleet.client.info().workers)
        yield fleet


def test_requests_wait_for_blocks(fleet: Fleet) -> None:
    large, small = fleet.client.complete(**LARGE), fleet.client.complete(**SMALL)
    completions = complete_all(fleet.client, [LARGE, SMALL] * 5)
    assert {c.token_ids for c in completions[::2]} == {large.token_ids}
    assert {c.token_ids for c in completions[1::2]} == {small.token_ids}
    assert not any(c.failovers for c in completions), "waiting is no failure"


def test_time_is_up_while_waiting_for_room(fleet: Fleet) -> None:
    client = fleet.client
    stream = Streamed(client, LARGE | {"max_tokens": 1200})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream.run)
        wait_until(lambda: bool(stream.token_ids), REQUEST_S, "the blocks are taken")
        with pytest.raises(OverloadedError, match="all workers were busy until the deadline"):
            client.complete(**HUGE, timeout=0.5)
        assert client.complete(**SMALL).usage.completion_tokens == 30, "a small one still fits"
        assert len(running.result(REQUEST_S).token_ids) == 1200
    wait_until_idle(client)


def test_time_is_up_in_mid_stream(fleet: Fleet) -> None:
    with pytest.raises(DeadlineExceededError):
        fleet.client.complete(**LARGE | {"max_tokens": 1200}, timeout=0.7)
    wait_until_idle(fleet.client, 1.0)


async def test_the_asynchronous_client(fleet: Fleet) -> None:
    expected = fleet.client.complete(**SMALL)
    async with AsyncClient(fleet.client.target) as client:
        token_ids: list[int] = []
        async with client.generate(**SMALL) as stream:
            async for chunk in stream:
                token_ids += chunk.token_ids
        assert tuple(token_ids) == stream.result.token_ids == expected.token_ids
        async with client.generate(**LARGE) as stream:
            async for _ in stream:
                break
    wait_until_idle(fleet.client, 1.0)
