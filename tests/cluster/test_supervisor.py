"""The supervisor on a real local Ray, with roles that serve gRPC but load no model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from cluster_helpers import HERE, free_port, listens, nothing_left, wait_until

from branchline.config import Config
from cluster import steering
from cluster.actors import create_actor
from cluster.orders import RefusedError, UnknownError
from cluster.placement import Plan, plan
from cluster.session import local_env, local_ray
from cluster.supervisor import StartError, Supervisor

pytestmark = pytest.mark.cluster

ROLES = {"prefill": "cluster_roles:worker", "decode": "cluster_roles:worker", "gateway": "cluster_roles:gateway"}


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    """A local Ray with four pretended GPUs; yields the environment that lets actors import the test roles."""
    with pytest.MonkeyPatch.context() as patch, nothing_left() as directory:
        patch.setattr("tempfile.tempdir", str(directory))
        with local_ray(8, print, gpus=4) as session:
            yield local_env({"PYTHONPATH": str(HERE)}, session)


@pytest.fixture
def lines() -> list[str]:
    return []


def supervise(config: Config, env: dict[str, str], lines: list[str], **roles: str) -> Supervisor:
    return Supervisor(Plan(config, serve_paths={**ROLES, **roles}), env, lines.append)


def small(**flags: object) -> Config:
    return Config().override(**{"engine.threads": 1, **flags})


def test_actors_claim_distinct_gpus(env: dict[str, str]) -> None:
    config = small(**{"prefill.replicas": 2, "decode.replicas": 2, "prefill.num_gpus": 1, "decode.num_gpus": 1})
    actors = [create_actor(seat, env) for seat in plan(config, serve_paths=ROLES) if seat.role != "gateway"]
    try:
        infos = ray.get([actor.info.remote() for actor in actors], timeout=60)
        assert sorted(info.gpu_ids for info in infos) == [("0",), ("1",), ("2",), ("3",)]
        assert len({info.pid for info in infos}) == 4
    finally:
        for actor in actors:
            ray.kill(actor)


def test_starts_tells_progress_restarts_and_ends(env: dict[str, str], lines: list[str]) -> None:
    supervisor = supervise(small(), env, lines)
    try:
        (gateway,) = supervisor.start(60)
        prefill, decode, _ = (member.address for member in supervisor.members)
        assert all(map(listens, (gateway, prefill, decode)))
        assert "prefill-0: loading with 1 threads, PASSIVE" in lines
        told = f"gateway-0: workers {prefill} | {decode}"
        wait_until(lambda: supervisor.round() or told in lines, 10, "the gateway hears of its workers")

        member = supervisor.members[1]
        os.kill(ray.get(member.actor.info.remote(), timeout=10).pid, signal.SIGKILL)
        wait_until(lambda: supervisor.round() or (member.ready and member.address != decode), 30, "a new decode worker")
        assert listens(member.address)
        assert not listens(decode)
        told = f"gateway-0: workers {prefill} | {member.address}"
        wait_until(lambda: supervisor.round() or told in lines, 10, "the gateway hears of it")
        lines.clear()

        killed = supervisor.members[2]
        os.kill(ray.get(killed.actor.info.remote(), timeout=10).pid, signal.SIGKILL)
        wait_until(lambda: supervisor.round() or killed.deaths == 1, 30, "the gateway's death is seen")
        wait_until(lambda: supervisor.round() or killed.ready, 30, "the gateway is back")
        assert killed.address == gateway, "clients know a gateway by its address"
        wait_until(lambda: supervisor.round() or told in lines, 10, "the new gateway hears of its workers")
        addresses = [gateway, prefill, member.address]
    finally:
        supervisor.close(5)
    wait_until(lambda: not any(map(listens, addresses)), 5, "all ports closed")


def test_several_of_each(env: dict[str, str], lines: list[str]) -> None:
    port = free_port()
    config = small(**{"prefill.replicas": 2, "decode.replicas": 2, "gateway.replicas": 2, "gateway.grpc_port": port})
    supervisor = supervise(config, env, lines)
    try:
        assert supervisor.start(60) == [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
        prefill0, prefill1, decode0, decode1, *_ = (member.address for member in supervisor.members)
        told = {f"gateway-{number}: workers {prefill0} {prefill1} | {decode0} {decode1}" for number in (0, 1)}
        wait_until(lambda: supervisor.round() or told <= set(lines), 10, "both gateways hear of all workers")
    finally:
        supervisor.close(5)


def test_a_wrong_configuration_is_told_in_its_own_words(env: dict[str, str], lines: list[str]) -> None:
    supervisor = supervise(small(), env, lines, decode="cluster_roles:misconfigured")
    with pytest.raises(StartError, match=r"^decode-0: model.model: /nowhere has no weights$") as caught:
        supervisor.start(60)
    assert caught.value.user_error
    supervisor.close(5)


def test_a_failing_role_is_told_with_its_kind(env: dict[str, str], lines: list[str]) -> None:
    supervisor = supervise(small(), env, lines, prefill="cluster_roles:broken")
    with pytest.raises(StartError, match="prefill-0: ZeroDivisionError: an accident") as caught:
        supervisor.start(60)
    assert not caught.value.user_error
    supervisor.close(5)


def test_a_process_that_dies_at_start_is_given_up(env: dict[str, str], lines: list[str]) -> None:
    supervisor = supervise(small(), env, lines, prefill="cluster_roles:suicidal")
    with pytest.raises(StartError, match="prefill-0: its process died 2 times while starting"):
        supervisor.start(60)
    supervisor.close(5)


def test_want_of_resources_is_named(env: dict[str, str], lines: list[str]) -> None:
    supervisor = supervise(small(**{"decode.num_gpus": 5}), env, lines)
    with pytest.raises(
        StartError, match=r"decode-0 .no process yet.*claims in all 3 CPU .* 5 GPU .[0-9]+ of 4 are free"
    ):
        supervisor.start(4)
    supervisor.close(2)


def test_a_role_that_heeds_no_stop_is_ended_by_force(env: dict[str, str], lines: list[str]) -> None:
    supervisor = supervise(small(), env, lines, decode="cluster_roles:stubborn")
    supervisor.start(60)
    pid = ray.get(supervisor.members[1].actor.info.remote(), timeout=10).pid
    began = time.monotonic()
    supervisor.close(1)
    assert time.monotonic() - began < 5
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), 10, "the process is gone")


def test_a_process_that_hangs_is_replaced(env: dict[str, str], lines: list[str]) -> None:
    supervisor = supervise(small(**{"ray.hung_after_s": 2.0}), env, lines)
    try:
        supervisor.start(60)
        member = supervisor.members[1]
        assert member.info
        stopped = member.info.pid
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: supervisor.round() or member.deaths == 1, 30, "it is noticed")
        wait_until(lambda: supervisor.round() or member.ready, 60, "it is back")
        assert member.info
        assert member.info.pid != stopped
        assert "decode-0: no answer for 2 s (ray.hung_after_s); its process is killed" in lines
    finally:
        supervisor.close(5)


def test_scaling_up_and_a_drain(env: dict[str, str], lines: list[str]) -> None:
    busy = Path(env["TMPDIR"]) / "busy"
    supervisor = supervise(small(), env | {"BRANCHLINE_TEST_BUSY": str(busy)}, lines)
    try:
        supervisor.start(60)
        prefill, first, _ = (member.address for member in supervisor.members)
        with pytest.raises(RefusedError, match=r"decode-0: it is the only decode that is ready"):
            steering.drain(supervisor, "decode-0", 30)
        with pytest.raises(UnknownError, match=r"decode-9: there is none of that name"):
            steering.drain(supervisor, "decode-9", 30)
        assert steering.scale(supervisor, {"decode": 2}, 30) == (["decode-1"], [])
        added = supervisor.roster.find("decode-1")
        assert added
        wait_until(lambda: supervisor.round() or added.ready, 60, "one more is ready")
        told = f"gateway-0: workers {prefill} | {first} {added.address}"
        wait_until(lambda: supervisor.round() or told in lines, 10, "the gateway hears of it")

        busy.touch()
        steering.drain(supervisor, "decode-0", 60)
        told += f" | {first} drain"
        wait_until(lambda: supervisor.round() or told in lines, 10, "the gateway hears that one drains")
        for _ in range(8):
            supervisor.round()
        assert supervisor.roster.find("decode-0"), "it has something to finish"
        busy.unlink()
        wait_until(lambda: supervisor.round() or supervisor.roster.find("decode-0") is None, 30, "it has gone")
        assert not listens(first)
        assert f"gateway-0: workers {prefill} | {added.address}" in lines
    finally:
        supervisor.close(5)
