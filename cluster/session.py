"""A connection to Ray: a local one that is started and ended here, or one that is running already."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray

#: Nothing goes through Ray's object store but configurations and addresses.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
#: Ray puts sockets below its directory. Their paths may have 107 bytes, of which Ray takes about 65 and we 16.
MAX_PARENT_LENGTH = 26
#: Seconds for Ray's own processes to end.
SHUTDOWN_TIMEOUT_S = 15.0

Report = Callable[[str], None]


class SessionError(RuntimeError):
    """Ray could not be started or reached."""


def repository_root() -> Path:
    """The directory that the top-level packages are imported from."""
    return Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def local_ray(cpus: float, report: Report, *, gpus: int | None = None, verbose: bool = False) -> Iterator[Path]:
    """Starts a Ray for this process alone, on the loopback interface; ends it and removes its files.

    Yields its directory, which is removed at the end. `gpus` None: those that the machine has.

    Ray's CPUs are tickets for placement, not cores. On a Ray of our own there is nobody else to be kept out, so it
    is given as many tickets as the system asks for: three actors of one CPU each also start on two cores.
    """
    report("starting a local Ray")
    directory = _session_directory()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        try:
            ray.init(
                address="local",
                num_cpus=max(1, math.ceil(cpus)),
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=verbose,
                logging_level=logging.WARNING,
                _temp_dir=str(directory),
                # Ray starts its workers with nice 15, to be gentle to batch jobs' neighbours; these serve.
                _system_config={"worker_niceness": 0},
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise SessionError(f"Ray did not start: {error}") from error
        yield directory
    finally:
        started = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        ray.shutdown()
        _end(started)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def joined_ray(address: str, report: Report, *, in_job: bool, verbose: bool = False) -> Iterator[None]:
    """Connects to a running Ray. Inside a job the working directory is Ray's business; outside, ours is uploaded."""
    report(f"joining Ray at {address}")
    runtime_env: dict[str, Any] = {}
    root = repository_root()
    if not in_job and (root / "pyproject.toml").exists():
        runtime_env["working_dir"] = str(root)
    try:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=verbose, logging_level=logging.WARNING)
    except (RuntimeError, ConnectionError, OSError, ValueError) as error:
        raise SessionError(f"cannot join Ray at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def local_env(environ: Mapping[str, str], directory: Path) -> dict[str, str]:
    """For a local Ray's workers: they import what this process can, and their temporary files go with the session."""
    paths = [str(repository_root()), *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TMPDIR": str(directory)}


def _session_directory() -> Path:
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="bl-ray-", dir=parent if len(parent) <= MAX_PARENT_LENGTH else "/tmp"))


def _end(processes: list[psutil.Process]) -> None:
    """Waits for processes to end; kills those that don't."""
    _, alive = psutil.wait_procs(processes, timeout=SHUTDOWN_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=SHUTDOWN_TIMEOUT_S)
