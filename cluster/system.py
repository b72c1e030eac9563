"""A whole system on Ray, from nothing to answering requests, and back to nothing."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import ray

from branchline.client import Client
from branchline.config import Config
from branchline.engine.models.locate import locate_draft, locate_model
from cluster import steering
from cluster.control import controlled
from cluster.placement import Plan, needed_resources
from cluster.session import joined_ray, local_env, local_ray
from cluster.supervisor import StartError, StartInterruptedError, Supervisor

#: Seconds that running requests have when the system is stopped by a signal, and its processes then have to end. Ray
#: kills a stopped job after 3.
GRACE_S = 5.0
JOB_GRACE_S = 1.0
#: Set by Ray in the process that it starts for a job.
JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"
#: Variables that workers get as this process has them.
PASSED_ON = ("HF_HUB_OFFLINE",)

Report = Callable[[str], None]
Stopping = Callable[[], bool]


@dataclass(frozen=True)
class System:
    """A system that answers requests."""

    #: The gateways' HOST:PORT.
    gateways: tuple[str, ...]
    supervisor: Supervisor
    #: The same of their HTTP APIs; empty without.
    http: tuple[str, ...] = ()

    def watch(self, stopping: Stopping) -> None:
        """Keeps it going until told to stop."""
        self.supervisor.watch(stopping)


def in_job(environ: Mapping[str, str]) -> bool:
    """Whether this process is a Ray job's."""
    return JOB_MARK in environ


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that workers get."""
    return {name: environ[name] for name in PASSED_ON if name in environ}


@contextlib.contextmanager
def running_system(
    config: Config, environ: Mapping[str, str], report: Report, stopping: Stopping, *, verbose: bool = False
) -> Iterator[System]:
    """Starts a system and yields it as soon as the first request can be answered; ends all that it has started.

    Raises ConfigError, ModelError, StartError, SessionError, or StartInterruptedError when told to stop too early.
    """
    local = config.ray.address in ("", "local")
    job, env = in_job(environ), passed_on(environ)
    with contextlib.ExitStack() as stack:
        if local:
            # Here rather than in the workers, which would do it too: a mistake shows before anything is started.
            for own in config.each().values():
                locate_model(own.model.model, report)
                locate_draft(own.model.draft, own.model.model, report)
            plan = Plan(config, tuple(sorted(os.sched_getaffinity(0))))
            needed = needed_resources(plan.first())
            session = stack.enter_context(local_ray(needed["CPU"], report, verbose=verbose))
            env |= local_env(environ, session)
            _check_gpus(needed["GPU"])
        else:
            plan = Plan(config)
            plan.check()
            stack.enter_context(joined_ray(config.ray.address, report, in_job=job, verbose=verbose))
        yield stack.enter_context(supervised(config, plan, env, report, stopping, JOB_GRACE_S if job else GRACE_S))


def _check_gpus(needed: float) -> None:
    """No node will ever join a local Ray, so that waiting for a GPU would be in vain."""
    present = ray.cluster_resources().get("GPU", 0)
    if needed > present:
        raise StartError(f"num_gpus: the system claims {needed:g} GPUs, this machine has {present:g}", user_error=True)


@contextlib.contextmanager
def supervised(
    config: Config, plan: Plan, env: Mapping[str, str], report: Report, stopping: Stopping, grace_s: float
) -> Iterator[System]:
    """The same on the Ray that this process has joined. Raises StartError or StartInterruptedError."""
    deadline = time.monotonic() + config.ray.start_timeout_s
    supervisor = Supervisor(plan, env, report)
    try:
        with controlled(supervisor, config) as control:
            if control:
                report(f"control at {control}")
            gateways = supervisor.start(config.ray.start_timeout_s, stopping)
            # With TLS the launcher is no client that a gateway would let in, but then its actor's word has to do: it
            # calls itself ready when it has found its workers and listens.
            for gateway in [] if config.security.outside.on else gateways:
                _await_answer(gateway, deadline, supervisor, stopping)
            yield System(tuple(gateways), supervisor, tuple(supervisor.http))
            report("stopping")
            asked = supervisor.stop_grace_s
            supervisor.ask_to_stop(grace_s if asked is None else asked)
            steering.finish(supervisor, grace_s if asked is None else asked)
    finally:
        supervisor.close(grace_s)


def _await_answer(gateway: str, deadline: float, supervisor: Supervisor, stopping: Stopping) -> None:
    """Waits until a gateway says that it can serve: it has found its workers."""
    with Client(gateway) as client:
        while not client.health(timeout=1.0):
            if stopping() or supervisor.stopping:
                raise StartInterruptedError
            if time.monotonic() > deadline:
                raise StartError(f"the gateway at {gateway} found no usable workers in time (ray.start_timeout_s)")
            supervisor.round()
