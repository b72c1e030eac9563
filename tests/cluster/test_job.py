"""`ray job submit` on a cluster of one node that the test starts: the default system, for real."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psutil
import pytest
from cluster_helpers import ROOT, listens, nothing_left, wait_until
from ray.job_submission import JobStatus, JobSubmissionClient
from ray_nodes import RAY, Node, ray_head, remove_all

from branchline.client import Client

pytestmark = pytest.mark.cluster


@pytest.fixture
def head() -> Iterator[Node]:
    with nothing_left() as directory:
        try:
            with ray_head(directory, **{"num-cpus": 4, "object-store-memory": 100 << 20}) as node:
                yield node
        finally:
            remove_all(directory)


def test_the_default_system_as_a_job(head: Node) -> None:
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


def _actors(head: Node) -> list[psutil.Process]:
    return [member for member in head.family() if "RoleActor" in " ".join(member.cmdline())]
