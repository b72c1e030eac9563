"""What the cluster tests share."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import yaml

from branchline.config import Config, to_mapping

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

#: Loopback only, no authentication token is written, nothing is reported home.
RAY_ENV = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "HF_HUB_OFFLINE": "1",
}


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        time.sleep(0.05)


def listens(address: str) -> bool:
    """Whether something accepts connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, int(port))) == 0


def free_port() -> int:
    """Below those that the system gives to whoever asks for any: nobody else takes it before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)  # Ray's own workers take those below
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))  # the loopback addresses of all nodes
            return port


def children() -> set[int]:
    """All descendants of the test process."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@contextlib.contextmanager
def nothing_left() -> Iterator[Path]:
    """Checks that the body leaves no child process, temporary file or shared memory.

    Yields the directory that temporary files must go to: TMPDIR for child processes.
    """
    directory = Path(tempfile.mkdtemp(prefix="bl-", dir="/tmp"))  # short: Ray's socket paths go below it
    before, shared = children(), set(os.listdir("/dev/shm"))
    try:
        yield directory
        wait_until(lambda: children() <= before, 5, "all child processes end")
        assert list(directory.iterdir()) == []
        assert {name for name in set(os.listdir("/dev/shm")) - shared if "plasma" in name} == set()
    finally:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in before:
                child.kill()
        shutil.rmtree(directory)


@contextlib.contextmanager
def launched(served: Config, directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, str]]:
    """A system on a Ray of its own: the process, the gateway and the control."""
    config, log = directory / "config.yaml", directory / "log"
    config.write_text(yaml.safe_dump(to_mapping(served)))
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
