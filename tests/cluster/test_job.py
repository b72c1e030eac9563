"""`ray job submit` on a cluster of one node that the test starts: the default system, for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cluster_helpers import ROOT, free_port, listens, nothing_left, wait_until
from ray.job_submission import JobStatus, JobSubmissionClient

from branchline.client import Client

pytestmark = pytest.mark.cluster

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")


@dataclass
class Head:
    """A Ray head node: its process, its dashboard's address, and the environment of its command line."""

    process: subprocess.Popen[bytes]
    dashboard: str
    env: dict[str, str]


@pytest.fixture
def head() -> Iterator[Head]:
    with nothing_left() as directory:
        env = {**os.environ, "TMPDIR": str(directory), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        port, dashboard = free_port(), free_port()
        options = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": free_port(),
            "num-cpus": 4,
            "object-store-memory": 100 << 20,
            "temp-dir": directory / "ray",
        }
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        log = directory / "head.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until(lambda: listens(f"127.0.0.1:{dashboard}") or process.poll() is not None, 60, "the dashboard")
            assert process.poll() is None, log.read_text()
            yield Head(process, f"http://127.0.0.1:{dashboard}", env)
        finally:
            _end(process)
            for path in sorted(directory.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the head node: the process, and all that descends from it."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        psutil.wait_procs(family, timeout=10)
        process.kill()


def test_the_default_system_as_a_job(head: Head) -> None:
    options = ["--address", head.dashboard, "--working-dir", ".", "--no-wait", "--submission-id", "serve"]
    launch = ["python", "-m", "cluster.launch", "--config", "deploy/ray/config.yaml"]
    command = [RAY, "job", "submit", *options, "--", *launch]
    done = subprocess.run(command, cwd=ROOT, env=head.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    jobs = JobSubmissionClient(head.dashboard)
    wait_until(
        lambda: "ready grpc=" in jobs.get_job_logs("serve") or jobs.get_job_status("serve").is_terminal(), 200, "ready"
    )
    log = jobs.get_job_logs("serve")
    assert jobs.get_job_status("serve") == JobStatus.RUNNING, log
    (address,) = [line.removeprefix("ready grpc=") for line in log.splitlines() if line.startswith("ready grpc=")]

    with Client(address) as client:
        result = client.complete(prompt="The capital of France is", max_tokens=16, timeout=60)
        workers = [worker.address for worker in client.info().workers]
    assert "Paris" in result.text
    assert result.usage.completion_tokens > 1
    assert result.speculation.accepted > 0
    actors = _actors(head)
    assert len(actors) == 3

    assert jobs.stop_job("serve")
    wait_until(lambda: jobs.get_job_status("serve").is_terminal(), 20, "the job has ended")
    assert jobs.get_job_status("serve") == JobStatus.STOPPED
    wait_until(lambda: not any(map(listens, [address, *workers])), 20, "all ports are closed")
    wait_until(lambda: not any(actor.is_running() for actor in actors), 20, "the actors have ended")
    assert "stopped" in jobs.get_job_logs("serve").splitlines()[-1]


def _actors(head: Head) -> list[psutil.Process]:
    family = psutil.Process(head.process.pid).children(recursive=True)
    return [member for member in family if "RoleActor" in " ".join(member.cmdline())]
