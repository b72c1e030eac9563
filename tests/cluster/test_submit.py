"""`python -m cluster.submit` where things go wrong. (That it starts and stops a system: test_deployed.py.)"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from cluster_helpers import ROOT, free_port, nothing_left
from ray.job_submission import JobStatus, JobSubmissionClient
from ray_nodes import ray_head, remove_all

from cluster import submit

pytestmark = pytest.mark.cluster


def run(*flags: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.submit", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose model does not exist; a link, as in a mounted ConfigMap."""
    real, link = tmp_path / "real.yaml", tmp_path / "config.yaml"
    real.write_text("model: {model: /nowhere}\nprefill: {num_cpus: 0.1}\ndecode: {num_cpus: 0.1}\n")
    link.symlink_to(real)
    return link


def test_a_wrong_configuration_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("decode: {replica: 1}\n")
    done = run("--config", str(wrong), "--address", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "decode.replica: unknown field" in done.stderr


def test_a_cluster_that_does_not_answer(config: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    done = run("--config", str(config), "--address", address, "--patience", "1")
    assert done.returncode == 1
    assert f"error: no dashboard at {address}, for 1 s now" in done.stderr


def test_what_is_left_over_is_stopped_and_a_users_mistake_is_told(config: Path) -> None:
    with nothing_left() as directory:
        try:
            with ray_head(directory, **{"num-cpus": 2, "object-store-memory": 100 << 20}) as head:
                jobs = JobSubmissionClient(head.dashboard)
                old = jobs.submit_job(entrypoint="sleep 600", metadata={submit.LABEL: "mine"})
                other = jobs.submit_job(entrypoint="sleep 600", metadata={submit.LABEL: "another's"})
                done = run("--config", str(config), "--address", head.dashboard, "--name", "mine", env=head.env)
                assert done.returncode == 2, done.stderr
                assert f"stopping {old}, which is left over" in done.stderr
                assert "/nowhere: no such directory" in done.stdout
                assert jobs.get_job_status(old) == JobStatus.STOPPED
                assert jobs.get_job_status(other) in (JobStatus.RUNNING, JobStatus.PENDING)
                jobs.stop_job(other)
        finally:
            remove_all(directory)
