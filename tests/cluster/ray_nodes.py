"""Ray nodes as processes of their own, for tests that need a cluster rather than a local Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from cluster_helpers import free_port, listens, wait_until

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
#: Machines may be busy otherwise.
START_S = 240.0


@dataclass(frozen=True)
class Node:
    """A running node: its process, and what its command line and those of its clients need."""

    process: subprocess.Popen[bytes]
    env: dict[str, str]
    #: The head's GCS, HOST:PORT.
    gcs: str
    #: The head's dashboard, a URL.
    dashboard: str
    #: HOST:PORT of the node's agent, which serves its health.
    agent: str

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextlib.contextmanager
def ray_head(
    directory: Path, env: Mapping[str, str] | None = None, ip: str = "127.0.0.1", **options: object
) -> Iterator[Node]:
    """A head with its files below `directory`; `options` are flags of `ray start`.

    For other nodes to join, the head needs another loopback address than 127.0.0.1, in whose place Ray takes the
    machine's own.
    """
    own = {**os.environ, **(env or {}), "TMPDIR": str(directory), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    port, dashboard, agent = options.pop("port", None) or free_port(), free_port(), free_port()
    flags = {
        "node-ip-address": ip,
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "temp-dir": directory / "ray",
    }
    with _node(directory / "head.log", ["--head"], {**flags, **options}, own) as process:
        wait_until(lambda: listens(f"127.0.0.1:{dashboard}") or process.poll() is not None, START_S, "the dashboard")
        assert process.poll() is None, (directory / "head.log").read_text()
        yield Node(process, own, f"{ip}:{port}", f"http://127.0.0.1:{dashboard}", f"{ip}:{agent}")


@contextlib.contextmanager
def ray_worker(directory: Path, head: Node, ip: str, **options: object) -> Iterator[Node]:
    """Another node on this machine, at a loopback address of its own, once it has joined.

    One after the other: nodes of one machine that start at once take the same sockets.
    """
    agent, log = free_port(), directory / f"{ip}.log"
    flags = {"address": head.gcs, "node-ip-address": ip, "dashboard-agent-listen-port": agent, **options}
    with _node(log, [], flags, head.env) as process:
        wait_until(lambda: listens(f"{ip}:{agent}") or process.poll() is not None, START_S, f"node {ip}")
        assert process.poll() is None, log.read_text()
        yield Node(process, head.env, head.gcs, head.dashboard, f"{ip}:{agent}")


@contextlib.contextmanager
def _node(
    log: Path, words: list[str], flags: Mapping[str, object], env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    command = [RAY, "start", *words, "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a node: the process, and all that descends from it."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:  # a node that hasn't started yet
        process.kill()
        process.wait(20)
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        psutil.wait_procs(family, timeout=10)


def remove_all(directory: Path) -> None:
    """Empties a directory."""
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
