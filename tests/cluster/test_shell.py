"""A role's thread, without Ray."""

from __future__ import annotations

import os
from typing import Any

import cluster_roles
import pytest
from cluster_helpers import listens, wait_until

from branchline.config import Config
from cluster.shell import RoleThread, State


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def reach(role: RoleThread, state: State) -> Any:
    wait_until(lambda: role.status().state is state, 10, f"{state}")
    return role.status()


def test_from_idle_to_stopped() -> None:
    role = RoleThread("cluster_roles:worker")
    assert role.status().state is State.IDLE
    role.start(Config())
    role.start(Config())  # has begun already
    status = reach(role, State.READY)
    assert listens(status.address)
    assert status.lines == ("loading with 1 threads, PASSIVE",)
    assert role.status(status.next_line).lines == ()
    assert role.stop(5)
    assert role.status().state is State.STOPPED
    assert not listens(status.address)


def test_a_second_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway's HTTP API."""

    async def two(_config: Config, *, ready: Any, stop: Any, **_arguments: Any) -> None:
        ready("127.0.0.1:1", "127.0.0.1:2")
        await stop.wait()

    monkeypatch.setattr(cluster_roles, "two", two, raising=False)
    role = RoleThread("cluster_roles:two")
    assert role.status().http == ""
    role.start(Config())
    assert reach(role, State.READY).http == "127.0.0.1:2"
    assert role.stop(5)


def test_a_user_error_keeps_its_words() -> None:
    role = RoleThread("cluster_roles:misconfigured")
    role.start(Config())
    status = reach(role, State.FAILED)
    assert (status.error, status.user_error) == ("model.model: /nowhere has no weights", True)


@pytest.mark.parametrize(
    ("path", "error"),
    [("cluster_roles:broken", "ZeroDivisionError: an accident"), ("no_such:serve", "ModuleNotFoundError: No module")],
)
def test_another_error_tells_its_kind(path: str, error: str) -> None:
    role = RoleThread(path)
    role.start(Config())
    status = reach(role, State.FAILED)
    assert status.error.startswith(error)
    assert not status.user_error


def test_stop_before_start_and_at_once() -> None:
    assert RoleThread("cluster_roles:worker").stop(0.1)
    role = RoleThread("cluster_roles:worker")
    role.start(Config())
    assert role.stop(5)


def test_stop_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(_config: Config, *, ready: Any, stop: Any, **_arguments: Any) -> None:
        ready("127.0.0.1:1")
        await stop.wait()
        os.read(pipe, 1)

    pipe, other = os.pipe()
    monkeypatch.setattr(cluster_roles, "slow", slow, raising=False)
    role = RoleThread("cluster_roles:slow")
    role.start(Config())
    reach(role, State.READY)
    assert not role.stop(0.2)
    os.write(other, b"x")
    assert role.stop(5)
    os.close(pipe)
    os.close(other)


def test_only_the_roles_threads_are_pinned() -> None:
    every = sorted(os.sched_getaffinity(0))
    seen: list[set[int]] = []

    async def look(_config: Config, **_arguments: Any) -> None:
        seen.append(os.sched_getaffinity(0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_roles, "look", look, raising=False)
        role = RoleThread("cluster_roles:look")
        role.start(Config(), every[:1])
        reach(role, State.STOPPED)
    assert seen == [{every[0]}]
    assert sorted(os.sched_getaffinity(0)) == every
