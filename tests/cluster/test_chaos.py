"""Two minutes of processes and nodes that die or stop: every stream ends, and with the text that it should have."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chaos_world import NODE_IPS, REQUEST_S, Caller, Cluster
from cluster_helpers import nothing_left, wait_until
from e2e_model import TinyModel, save_served_model
from ray_nodes import remove_all

from branchline.client import Client

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STREAMS, SECONDS, EVERY_S = 16, 120.0, 20.0
TOKENS = 400
LETTERS = "a bad cab faded in a deck "
SAMPLED = {"temperature": 0.9, "top_p": 0.95}
#: What may be hit, and how; "stop" is SIGSTOP.
STRIKES = [(role, how) for role in ("decode", "prefill", "gateway") for how in ("kill", "stop")] + [("node", "kill")]


@dataclass(frozen=True)
class Strike:
    at: float
    what: str
    how: str
    address: str


def requests() -> list[dict[str, Any]]:
    base = {"max_tokens": TOKENS, "ignore_eos": True}
    greedy: list[dict[str, Any]] = [base | {"prompt": LETTERS[start:]} for start in range(4)]
    return greedy + [options | SAMPLED | {"seed": seed} for seed, options in enumerate(greedy)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_served_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cluster(model: TinyModel) -> Iterator[Cluster]:
    flags: dict[str, Any] = {"gateway.stall_timeout_s": 3.0, "gateway.request_timeout_s": 120.0}
    # One decode worker has room for all streams: what is measured is the failover, not the wait for room.
    flags |= {"ray.start_timeout_s": 200.0, "ray.hung_after_s": 5.0, "engine.max_batch": STREAMS}
    for role in ("prefill", "decode", "gateway"):
        flags |= {f"{role}.replicas": len(NODE_IPS), f"{role}.resource": role, f"{role}.host": "0.0.0.0"}
    with nothing_left() as directory:
        try:
            with Cluster(directory, model.config(**flags)) as running:
                yield running
        finally:
            remove_all(Path(directory))


def strike(cluster: Cluster, what: str, how: str, draw: random.Random) -> Strike:
    """Waits until nobody is hit who is the last of its role."""
    wait_until(lambda: cluster.whole, 90, "all are well again")
    if what == "node":
        address = draw.choice(NODE_IPS)
        cluster.kill_node(address)
        return Strike(time.monotonic(), what, how, address)
    address = draw.choice(cluster.healthy()[what])
    if how == "kill":
        cluster.process(address).kill()
    else:
        cluster.freeze(address)
    return Strike(time.monotonic(), what, how, address)


def mend(cluster: Cluster, done: Strike) -> None:
    """A machine comes back; what dies or stops comes back by Ray and the supervisor."""
    if done.what == "node":
        cluster.start_node(done.address)


def pauses(done: Strike, callers: list[Caller]) -> list[float]:
    """Seconds without a token of each stream for which that is a pause at all, around the strike."""
    around = [
        [gap.seconds for gap in caller.gaps if gap.began < done.at + 1 and gap.began + gap.seconds > done.at]
        for caller in callers
    ]
    return sorted(longest for gaps in around if gaps and (longest := max(gaps)) > 0.25)


def test_every_stream_ends_with_its_text(cluster: Cluster, model: TinyModel) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    with Client(cluster.gateways[0]) as client:
        expected = [client.complete(**options) for options in requests()]
    for options, completion in list(zip(requests(), expected, strict=True))[:4]:
        assert list(completion.token_ids) == model.greedy(options["prompt"], TOKENS)

    began = time.monotonic()
    targets = [",".join(cluster.gateways), ",".join(reversed(cluster.gateways))]
    callers = [Caller(targets[n % 2], requests(), expected, n, began + SECONDS) for n in range(STREAMS)]
    strikes: list[Strike] = []
    deck: list[tuple[str, str]] = []
    with ThreadPoolExecutor(STREAMS) as pool:
        running = [pool.submit(caller.run) for caller in callers]
        while (at := began + EVERY_S * len(strikes) + EVERY_S / 2) < began + SECONDS:
            time.sleep(max(0.0, at - time.monotonic()))
            deck = deck or draw.sample(STRIKES, len(STRIKES))
            strikes.append(strike(cluster, *deck.pop(), draw))
            print(f"{strikes[-1].at - began:5.1f} s: {strikes[-1].how} {strikes[-1].what} {strikes[-1].address}")
            mend(cluster, strikes[-1])
        for future in running:
            future.result(REQUEST_S + 10)
    for done in strikes:
        found = pauses(done, callers)
        seconds = f", {statistics.median(found):.2f} s, {max(found):.2f} s at most" if found else ""
        print(f"{done.how} {done.what}: {len(found)} streams paused{seconds}")
    print(f"{sum(c.done for c in callers)} requests, {sum(c.failovers for c in callers)} failovers")

    assert all(caller.done for caller in callers)
    wait_until(lambda: cluster.whole, 120, "all are well in the end")
    wait_until(lambda: not leaked(cluster), 15, f"nothing is held any more: {leaked(cluster)}")
    assert cluster.stop() == 0


def leaked(cluster: Cluster) -> list[object]:
    """What is in use of what all gateways see."""
    infos = [cluster.info(gateway) for gateway in cluster.gateways]
    held: list[object] = [info for info in infos if info is None or info.active_requests]
    return held + [w for info in infos if info for w in info.workers if w.blocks_used or w.requests or w.tasks]
