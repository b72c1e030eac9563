"""Processes that come and go by command while streams run: nothing is lost, and every text is the undisturbed one."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster_helpers import launched, nothing_left
from e2e_model import TinyModel, save_served_model

from branchline.client import Client, Completion
from cluster.cli import main

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STREAMS = 6


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    return save_served_model(tmp_path)


def options(number: int) -> dict[str, Any]:
    sampled = {"temperature": 0.9, "seed": number} if number % 2 else {}
    return {"prompt": "a bad cab faded in a deck "[number:], "max_tokens": 300, "ignore_eos": True, **sampled}


def test_streams_go_on_while_workers_come_and_go(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_left() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        config = tiny.config(**{"gateway.stall_timeout_s": 10.0})
        with launched(config, directory) as (process, gateway, control), Client(gateway) as client:

            def run(*words: str) -> None:
                assert main([*words, "--control", control]) == 0, capsys.readouterr()

            def loop(number: int) -> list[Completion]:
                answers = []
                while not done:
                    answers.append(client.complete(**options(number), timeout=90))
                return answers

            expected = [client.complete(**options(number)) for number in range(STREAMS)]
            done: list[bool] = []
            with ThreadPoolExecutor(STREAMS) as pool:
                running = [pool.submit(loop, number) for number in range(STREAMS)]
                try:
                    run("scale", "--prefill", "2", "--decode", "2")
                    run("drain", "decode-0", "--grace", "0.5")  # what it has goes on elsewhere
                    run("drain", "prefill-0", "--grace", "30")
                    run("scale", "--decode", "2")
                    run("update", "--tree", "chain:2", "--grace", "1")  # every worker is another one afterwards
                finally:
                    done.append(True)
                answers = [future.result(120) for future in running]
            for number, found in enumerate(answers):
                assert {answer.token_ids for answer in found} == {expected[number].token_ids}
                assert {answer.text for answer in found} == {expected[number].text}
            assert any(answer.failovers for found in answers for answer in found)
            capsys.readouterr()
            run("status", "--json")
            ids = [worker["id"] for worker in json.loads(capsys.readouterr().out)["workers"]]
            assert ids == ["prefill-2", "decode-3", "decode-4", "gateway-0"]
            run("stop", "--grace", "5")
            assert process.wait(30) == 0


def test_a_gateway_drains_while_it_relays(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_left() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        with launched(tiny.config(), directory) as (process, _, control):

            def gateways() -> dict[str, str]:
                capsys.readouterr()
                assert main(["status", "--json", "--control", control]) == 0
                workers = json.loads(capsys.readouterr().out)["workers"]
                return {worker["id"]: worker["address"] for worker in workers if worker["role"] == "gateway"}

            assert main(["scale", "--gateway", "2", "--control", control]) == 0
            first, second = gateways().values()
            with Client(first) as one, Client(f"{first},{second}") as both, ThreadPoolExecutor(STREAMS) as pool:
                expected = [one.complete(**options(number)) for number in range(STREAMS)]
                done = threading.Event()

                def loop(number: int) -> list[Completion]:
                    answers = []
                    while not done.is_set():
                        answers.append(both.complete(**options(number), timeout=60))
                    return [*answers, both.complete(**options(number), timeout=60)]

                running = [pool.submit(loop, number) for number in range(STREAMS)]
                try:
                    assert main(["drain", "gateway-0", "--grace", "0.2", "--control", control]) == 0
                finally:
                    done.set()
                for number, future in enumerate(running):
                    assert {answer.token_ids for answer in future.result(120)} == {expected[number].token_ids}
                    assert {answer.text for answer in future.result()} == {expected[number].text}
            assert gateways() == {"gateway-1": second}
            assert main(["stop", "--grace", "5", "--control", control]) == 0
            assert process.wait(30) == 0
