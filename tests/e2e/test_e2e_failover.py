"""Workers that die or hang in the middle of everything: the streams go on at the next token, as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2e_helpers import REQUEST_S, Fleet, Options, Streamed, complete_all, complete_disturbed, running_fleet, wait_until
from e2e_model import TinyModel

from branchline.client import Completion

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

SAMPLED = {"temperature": 0.9, "top_p": 0.95}
LETTERS = "a bad cab faded in a deck "


def long_streams() -> list[Options]:
    """Greedy and sampled ones, a second or more each."""
    base = {"max_tokens": 500, "ignore_eos": True}
    greedy = [base | {"prompt": LETTERS[start:]} for start in range(3)]
    return greedy + [options | SAMPLED | {"seed": seed} for seed, options in enumerate(greedy)]


def long_prompts() -> list[Options]:
    """Prompts of many chunks: they queue at the prefill workers."""
    base = {"max_tokens": 20, "ignore_eos": True}
    greedy = [base | {"prompt": LETTERS[start:] * 70} for start in range(6)]
    return greedy + [options | SAMPLED | {"seed": seed} for seed, options in enumerate(greedy)]


@pytest.fixture(scope="module")
def two_of_each(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    config = tiny.config(**{"prefill.replicas": 2, "decode.replicas": 2, "gateway.stall_timeout_s": 3.0})
    with running_fleet(config, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def fleet(two_of_each: Fleet) -> Iterator[Fleet]:
    yield two_of_each
    two_of_each.revive()


@pytest.fixture(params=["killed", "frozen"])
def strike(request: pytest.FixtureRequest, fleet: Fleet) -> Callable[[str], None]:
    """What happens to a worker."""
    return fleet.kill if request.param == "killed" else fleet.freeze


def same(disturbed: list[Completion], undisturbed: list[Completion]) -> bool:
    return [(c.token_ids, c.text) for c in disturbed] == [(c.token_ids, c.text) for c in undisturbed]


def test_a_decode_worker_is_lost_in_mid_stream(fleet: Fleet, strike: Callable[[str], None]) -> None:
    undisturbed = complete_all(fleet.client, long_streams())
    hit = 0

    def strike_the_busiest() -> None:
        nonlocal hit
        victim = fleet.busiest("decode")
        hit = victim.requests
        strike(victim.address)

    disturbed = complete_disturbed(fleet.client, long_streams(), strike_the_busiest)
    assert same(disturbed, undisturbed)
    assert all(len(completion.token_ids) == 500 for completion in disturbed)
    assert 1 <= hit <= sum(completion.failovers >= 1 for completion in disturbed)


def test_a_prefill_worker_is_lost_while_prompts_wait(fleet: Fleet, strike: Callable[[str], None]) -> None:
    undisturbed = complete_all(fleet.client, long_prompts())
    streams = [Streamed(fleet.client, options) for options in long_prompts()]
    with ThreadPoolExecutor(len(streams)) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_until(lambda: fleet.busiest("prefill").requests > 1, REQUEST_S, "prompts wait")
        strike(fleet.busiest("prefill").address)
        disturbed = [future.result(REQUEST_S) for future in running]
    assert same(disturbed, undisturbed)
    assert any(completion.failovers for completion in disturbed)
