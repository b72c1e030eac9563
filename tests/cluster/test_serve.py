"""`branchline serve` with the default model, from start to stop, as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster_helpers import ROOT, listens, nothing_left, wait_until

from branchline.client import Client
from cluster.cli import main

pytestmark = pytest.mark.cluster

FLAGS = ("--dtype", "float32", "--http-port", "0")
PROMPT = "List the months of the year:"


@contextlib.contextmanager
def serving(directory: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Runs the command in a process group of its own, as a terminal does; yields it and its standard output's file."""
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "serve",
        "--ray-address",
        "local",
        "--provider",
        "reference",
        *flags,
    ]
    out, err = directory / "out", directory / "err"
    with out.open("wb") as output, err.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(directory)},
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    try:
        yield process, out
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        print(out.read_text(), err.read_text())
        out.unlink()
        err.unlink()


def test_serves_survives_a_killed_worker_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_left() as directory, serving(directory, *FLAGS) as (process, out):
        wait_until(lambda: "\n" in out.read_text() or process.poll() is not None, 120, "ready")
        ready = out.read_text()
        address, _, http = ready.removeprefix("ready grpc=").strip().partition(" http=")
        with urllib.request.urlopen(f"http://{http}/health", timeout=10) as response:
            assert json.load(response) == {"status": "ok"}

        assert main(["generate", "--target", address, "--json", "--max-tokens", "64", PROMPT]) == 0
        expected = json.loads(capsys.readouterr().out)
        assert expected["usage"]["completion_tokens"] > 32
        assert expected["speculation"]["acceptance_length"] > 1

        with Client(address) as client:
            before = {worker.role: worker.address for worker in client.info().workers}
            with client.generate(prompt=PROMPT, max_tokens=64, timeout=100) as stream:
                tokens = list(next(stream).token_ids)
                _listener(process.pid, before["decode"]).kill()
                for chunk in stream:
                    tokens += chunk.token_ids
                assert stream.result.failovers >= 1
            assert tokens == expected["token_ids"], "nothing lost, nothing twice"
            after = {worker.role: worker.address for worker in client.info().workers if worker.healthy}
        assert after["prefill"] == before["prefill"]
        assert after["decode"] != before["decode"]

        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
        assert process.wait(20) == 0
        assert out.read_text() == ready
        assert not any(map(listens, [address, http, *after.values()]))


def _listener(parent: int, address: str) -> psutil.Process:
    """The descendant of `parent` that listens at an address."""
    port = int(address.rpartition(":")[2])
    for process in psutil.Process(parent).children(recursive=True):
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp")):
            return process
    raise AssertionError(f"nobody listens at {address}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft", "/nowhere"], "/nowhere: no such directory"),  # found before Ray is started
        (["--tree", "[[0],[1,0]]"], "model.tree: "),  # found by the workers
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(flags: list[str], message: str) -> None:
    _assert_refused(flags, message)


def test_a_missing_gpu_is_told(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("decode: {num_gpus: 99}\n")
    _assert_refused(["--config", str(config)], "num_gpus: the system claims 99 GPUs, this machine has ")


def test_a_busy_port_is_told_and_leaves_nothing() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        _assert_refused(["--grpc-port", str(port)], f"port {port} on 127.0.0.1 is in use")


def _assert_refused(flags: list[str], message: str) -> None:
    with nothing_left() as directory, serving(directory, *flags) as (process, out):
        assert process.wait(120) == 2
        assert out.read_text() == ""
        lines = [line for line in (directory / "err").read_text().splitlines() if not line.startswith("[")]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert message in lines[0]


def test_a_stop_while_it_starts_is_a_clean_one() -> None:
    with nothing_left() as directory, serving(directory) as (process, out):
        wait_until(lambda: "starting a local Ray" in (directory / "err").read_text(), 30, "it has begun")
        wait_until(lambda: len(psutil.Process(process.pid).children()) > 1, 30, "Ray is starting")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert out.read_text() == ""
