"""One decode worker and no other: what a client sees while it is gone, and when it comes back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from e2e_helpers import REQUEST_S, START_S, Fleet, Streamed, running_fleet, wait_until, wait_until_idle
from e2e_model import TinyModel

from benchmarks.local_system import Process
from branchline.client import Client, UnavailableError
from branchline.config import Config

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

HASTY_S = 2.0
PATIENT_S = 60.0
OPTIONS = {"prompt": "a bad cab", "max_tokens": 600, "ignore_eos": True}


@pytest.fixture(scope="module")
def config(tiny: TinyModel) -> Config:
    return tiny.config(**{"gateway.worker_wait_s": HASTY_S})


@pytest.fixture(scope="module")
def fleet(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(config, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def patient(fleet: Fleet, config: Config, tmp_path: Path) -> Iterator[tuple[Process, Client]]:
    """A second gateway in front of the same workers, which waits longer for one to come back."""
    addresses = {
        f"{role}_workers": tuple(worker.address for worker in fleet.client.info().workers if worker.role == role)
        for role in ("prefill", "decode")
    }
    settings = dataclasses.replace(config.gateway, worker_wait_s=PATIENT_S, **addresses)
    gateway = Process("gateway", dataclasses.replace(config, gateway=settings), tmp_path, "patient")
    try:
        with Client(gateway.address(START_S)) as client:
            yield gateway, client
    finally:
        gateway.stop()


def test_a_clear_error_or_the_same_text(fleet: Fleet, patient: tuple[Process, Client]) -> None:
    """Two streams lose their worker: the impatient gateway gives up in time, the patient one goes on."""
    undisturbed = fleet.client.complete(**OPTIONS)
    streams = [Streamed(client, OPTIONS) for client in (fleet.client, patient[1])]
    with ThreadPoolExecutor(2) as pool:
        hasty, waiting = [pool.submit(stream.run) for stream in streams]
        wait_until(lambda: all(len(stream.token_ids) > 10 for stream in streams), REQUEST_S, "both streams run")
        fleet.kill(fleet.busiest("decode").address)
        killed_at = time.monotonic()
        with pytest.raises(UnavailableError, match="no worker can serve: only a prefill worker is there for 2 s"):
            hasty.result(REQUEST_S)
        assert time.monotonic() - killed_at < HASTY_S + 5
        with pytest.raises(UnavailableError, match="no worker can serve"):
            fleet.client.complete(**OPTIONS)
        wait_until_idle(fleet.client)

        fleet.restart()  # the patient request may be running again before this returns
        again = fleet.client.complete(**OPTIONS)
        resumed = waiting.result(REQUEST_S)
    assert again.token_ids == resumed.token_ids == undisturbed.token_ids
    assert again.text == resumed.text == undisturbed.text
    assert (again.failovers, resumed.failovers) == (0, 1)


def test_a_gateway_that_dies_leaves_nothing_on_the_workers(fleet: Fleet, patient: tuple[Process, Client]) -> None:
    gateway, client = patient
    streams = [Streamed(client, OPTIONS | {"max_tokens": 1500}) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_until(lambda: all(len(stream.token_ids) > 10 for stream in streams), REQUEST_S, "all streams run")
        gateway.popen.kill()
        wait_until_idle(fleet.client, 3.0)
        for future in running:
            with pytest.raises(UnavailableError, match=client.target):
                future.result(10)
    assert fleet.client.complete(**OPTIONS).failovers == 0
