"""Workers that come and go by command while streams run: nothing is lost, and every text is the undisturbed one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_helpers import ROOT, nothing_left, wait_until
from e2e_model import TinyModel, save_served_model

from branchline.client import Client, Completion
from branchline.config import to_mapping
from cluster.cli import main

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STREAMS = 6


@pytest.fixture
def tiny(tmp_path: Path) -> TinyModel:
    return save_served_model(tmp_path)


@contextlib.contextmanager
def launched(tiny: TinyModel, directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, str]]:
    """The process, the gateway and the control."""
    config, log = directory / "config.yaml", directory / "log"
    config.write_text(yaml.safe_dump(to_mapping(tiny.config(**{"gateway.stall_timeout_s": 10.0}))))
    command = [sys.executable, "-m", "cluster.launch", "--config", str(config), "--ray-address", "local"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "ready grpc=" in log.read_text() or process.poll() is not None, 120, "ready")
        lines = log.read_text().splitlines()
        (ready,) = [line.removeprefix("ready grpc=") for line in lines if line.startswith("ready grpc=")]
        (control,) = [line.partition("control at ")[2] for line in lines if "control at " in line]
        yield process, ready, control
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        print(log.read_text())
        config.unlink()
        log.unlink()


def options(number: int) -> dict[str, Any]:
    sampled = {"temperature": 0.9, "seed": number} if number % 2 else {}
    return {"prompt": "a bad cab faded in a deck "[number:], "max_tokens": 300, "ignore_eos": True, **sampled}


def test_streams_go_on_while_workers_come_and_go(tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_left() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        with launched(tiny, directory) as (process, gateway, control), Client(gateway) as client:

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
