"""Keeps a system running as a Ray job, from outside the cluster: `python -m cluster.submit --config FILE`.

Submits `python -m cluster.launch` with the configuration, prints the job's log, and stays as long as the job does. On
SIGTERM or SIGINT the job is stopped. Made to be restarted by whoever runs it (the Helm chart's launcher): what an
earlier run of the same name has left behind is stopped first. Exit code 0 after a stop that was asked for, 2 when the
job has ended for a mistake in configuration, model or port, 1 for anything else, a lost cluster included.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from branchline.config import ConfigError, load
from cluster.launch import EXIT_FAILED, EXIT_OK, EXIT_USAGE, StopSignal, fail, prepare_ray_environment

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

#: The job's metadata that tells whose it is.
LABEL = "branchline"
#: The configuration's name in the job's working directory.
CONFIG = "config.yaml"
ENTRYPOINT = f"python -m cluster.launch --config {CONFIG} --ray-address auto"
#: Seconds between two looks at the job.
POLL_S = 1.0
#: Seconds that a job has to end after it was told to.
STOP_TIMEOUT_S = 30.0

Stopping = Callable[[], bool]
T = TypeVar("T")


class LostError(RuntimeError):
    """The cluster doesn't answer, or doesn't know the job."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.submit", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the system's configuration, which travels with the job")
    add("--address", required=True, metavar="URL", help="the cluster's dashboard, such as http://HEAD:8265")
    add("--name", default="branchline", help="jobs of this name are replaced (default: %(default)s)")
    add("--patience", type=float, default=60.0, metavar="S", help="seconds that the cluster may be unreachable")
    arguments = parser.parse_args(argv)
    try:
        load(arguments.config)
    except ConfigError as error:
        return fail(str(error), EXIT_USAGE)
    stop = StopSignal()
    stop.install()
    prepare_ray_environment(local=False)
    launcher = Launcher(arguments.address, arguments.name, arguments.patience, stop.is_set)
    try:
        return launcher.run(Path(arguments.config))
    except LostError as error:
        return fail(str(error), EXIT_OK if stop.is_set() else EXIT_FAILED)


class Launcher:
    """One job of a name on the cluster whose dashboard is at `address`, a URL."""

    def __init__(self, address: str, name: str, patience_s: float, stopping: Stopping) -> None:
        self._address = address
        self._name = name
        self._patience_s = patience_s
        self._stopping = stopping

    def run(self, config: Path) -> int:
        """Submits the job and returns an exit code when it has ended. Raises LostError."""
        jobs = self._patiently(self._connect, f"no dashboard at {self._address}")
        if jobs is None:
            return EXIT_OK
        for job in self._patiently(jobs.list_jobs, "the cluster lists no jobs") or []:
            if (job.metadata or {}).get(LABEL) == self._name and job.submission_id and not job.status.is_terminal():
                print(f"stopping {job.submission_id}, which is left over", file=sys.stderr, flush=True)
                self._stop(jobs, job.submission_id)
        if self._stopping():
            return EXIT_OK
        job_id = f"{self._name}-{uuid.uuid4().hex[:8]}"
        with _directory_with(config) as directory:
            jobs.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=job_id,
                runtime_env={"working_dir": str(directory)},
                metadata={LABEL: self._name},
            )
        print(f"submitted {job_id}", file=sys.stderr, flush=True)
        return self._follow(jobs, job_id)

    def _connect(self) -> JobSubmissionClient:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self._address)

    def _follow(self, jobs: JobSubmissionClient, job_id: str) -> int:
        told = 0
        while True:
            details = self._look(jobs, job_id)
            if details is None:
                self._stop(jobs, job_id)
            log = self._look_at_log(jobs, job_id)
            print(log[told:], end="", flush=True)
            told = max(told, len(log))
            if details is None:
                return EXIT_OK
            if details.status.is_terminal():
                print(f"{job_id} has ended: {details.status} {details.message or ''}", file=sys.stderr, flush=True)
                return EXIT_USAGE if details.driver_exit_code == EXIT_USAGE else EXIT_FAILED
            _sleep(POLL_S, self._stopping)

    def _look(self, jobs: JobSubmissionClient, job_id: str) -> JobDetails | None:
        """What the cluster says about the job; None when this program shall stop."""
        return self._patiently(lambda: jobs.get_job_info(job_id), f"the cluster does not know {job_id}")

    def _look_at_log(self, jobs: JobSubmissionClient, job_id: str) -> str:
        with contextlib.suppress(RuntimeError, ConnectionError):  # `_look` is the one that notices a lost cluster
            log: str = jobs.get_job_logs(job_id)
            return log
        return ""

    def _stop(self, jobs: JobSubmissionClient, job_id: str) -> None:
        """Stops a job and waits for its end, for a bounded time. Raises LostError."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        try:
            jobs.stop_job(job_id)
            while not jobs.get_job_status(job_id).is_terminal():
                if time.monotonic() > deadline:
                    raise LostError(f"{job_id} has not ended {STOP_TIMEOUT_S:g} s after it was stopped")
                time.sleep(POLL_S / 4)
        except (RuntimeError, ConnectionError) as error:
            if isinstance(error, LostError):
                raise
            raise LostError(f"{job_id} could not be stopped: {error}") from error

    def _patiently(self, ask: Callable[[], T], otherwise: str) -> T | None:
        """An answer of the cluster, asked for again for as long as `patience_s`; None when this program shall stop."""
        deadline = time.monotonic() + self._patience_s
        while not self._stopping():
            try:
                return ask()
            except (RuntimeError, ConnectionError) as error:  # what the client raises for HTTP and for the network
                if time.monotonic() > deadline:
                    raise LostError(f"{otherwise}, for {self._patience_s:g} s now: {error}") from error
            _sleep(POLL_S, self._stopping)
        return None


@contextlib.contextmanager
def _directory_with(config: Path) -> Iterator[Path]:
    """A directory that holds a copy of the configuration and nothing else. A mounted ConfigMap is full of links."""
    with tempfile.TemporaryDirectory(prefix="branchline-") as directory:
        shutil.copyfile(config, Path(directory) / CONFIG)
        yield Path(directory)


def _sleep(seconds: float, stopping: Stopping) -> None:
    until = time.monotonic() + seconds
    while not stopping() and (left := until - time.monotonic()) > 0:
        time.sleep(min(0.1, left))


if __name__ == "__main__":
    sys.exit(main())
