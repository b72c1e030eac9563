"""A system that outlives the process that started it: its supervisor runs in a detached actor of the cluster."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from branchline.config import Config, ConfigError
from branchline.engine.models.errors import ModelError
from cluster.placement import Plan
from cluster.session import SessionError
from cluster.supervisor import StartError, StartInterruptedError
from cluster.system import GRACE_S, supervised

#: The actor's name and namespace: a cluster has one such system.
NAME, NAMESPACE = "launcher", "branchline"
#: Keeps it on the head node, which outlives all others.
_HEAD = {"node:__internal_head__": 0.001}
_POLL_S = 0.25
#: Seconds for an answer of the actor, its creation included.
_ANSWER_S = 60.0

Report = Callable[[str], None]
Stopping = Callable[[], bool]


@dataclass(frozen=True)
class Progress:
    """How far the actor is. `error`: why the system could not be started, or ended."""

    lines: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    http: tuple[str, ...] = ()
    error: str = ""
    user_error: bool = False


class Launcher:
    """The actor: one thread starts the system and watches it; the methods only look. It ends itself with the system."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._found = Progress()

    def start(self, config: Config, env: Mapping[str, str]) -> None:
        threading.Thread(target=self._run, args=(config, dict(env)), name="supervisor", daemon=True).start()

    def progress(self, since: int) -> Progress:
        """With the lines from number `since` on."""
        found = self._found
        return Progress(tuple(self._lines[since:]), found.gateways, found.http, found.error, found.user_error)

    def _run(self, config: Config, env: Mapping[str, str]) -> None:
        try:
            plan = Plan(config)
            plan.check()
            with supervised(config, plan, env, self._lines.append, lambda: False, GRACE_S) as system:
                self._found = Progress(gateways=system.gateways, http=system.http)
                system.watch(lambda: False)
        except (ConfigError, ModelError) as error:
            self._found = Progress(error=str(error), user_error=True)
        except StartError as error:
            self._found = Progress(error=str(error), user_error=error.user_error)
        except StartInterruptedError:
            self._found = Progress(error="it was stopped while it started")
        else:
            ray.kill(ray.get_runtime_context().current_actor)


def start(config: Config, env: Mapping[str, str], report: Report, stopping: Stopping) -> Progress:
    """Starts a detached system on the Ray that this process has joined; returns when it serves.

    Raises StartError or SessionError, and StartInterruptedError when told to stop before; nothing is left then.
    """
    try:
        launcher: Any = (
            ray.remote(Launcher)
            .options(name=NAME, namespace=NAMESPACE, lifetime="detached", num_cpus=0, resources=_HEAD)
            .remote()
        )
    except ValueError as error:
        raise SessionError(f"there is a detached system in this cluster already: {error}") from None
    try:
        launcher.start.remote(config, env)
        return _await_ready(launcher, report, stopping)
    except BaseException:
        with contextlib.suppress(RayError):
            ray.kill(launcher)
        raise


def _await_ready(launcher: Any, report: Report, stopping: Stopping) -> Progress:
    seen = 0
    while True:
        try:
            found: Progress = ray.get(launcher.progress.remote(seen), timeout=_ANSWER_S)
        except GetTimeoutError:
            raise SessionError(f"the launcher's actor does not answer in {_ANSWER_S:g} s") from None
        except RayError as error:
            raise SessionError(f"the launcher's actor died: {error}") from error
        for line in found.lines:
            report(line)
        seen += len(found.lines)
        if found.error:
            raise StartError(found.error, user_error=found.user_error)
        if found.gateways:
            return found
        if stopping():
            raise StartInterruptedError
        time.sleep(_POLL_S)
