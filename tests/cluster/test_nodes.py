"""Placement on several Ray nodes: labels, memory, custom resources, groups, and a node that is lost. Light roles."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import psutil
import pytest
import ray
from chaos_world import NODE_ENV
from cluster_helpers import HERE, ROOT, nothing_left, wait_until
from ray_nodes import Node, ray_head, ray_worker, remove_all

from branchline.config import Config
from cluster.placement import Plan
from cluster.supervisor import StartInterruptedError, Supervisor

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

HEAD, ONE, OTHER = "127.0.0.2", "127.0.0.3", "127.0.0.4"
ROLES = {"prefill": "cluster_roles:worker", "decode": "cluster_roles:worker", "gateway": "cluster_roles:gateway"}
MIB = 1 << 20
START_S = 60.0


#: What the nodes differ in. The head offers one CPU, and hardly any memory.
NODES: Mapping[str, Mapping[str, object]] = {
    ONE: {"labels": "zone=a", "memory": 600 * MIB, "resources": json.dumps({"fast": 1})},
    OTHER: {"labels": "zone=b", "memory": 2000 * MIB},
}


@pytest.fixture(scope="module")
def lose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """A head and two nodes, joined; yields what ends a node at once, as when a machine fails."""
    tmp_path_factory.getbasetemp()  # pytest's own files go elsewhere
    with nothing_left() as directory, ExitStack() as stack:
        stack.callback(remove_all, directory)
        flags = {"num-cpus": 1, "object-store-memory": 80 * MIB, "memory": 100 * MIB}
        head = stack.enter_context(ray_head(directory, NODE_ENV, HEAD, **flags))
        there: dict[str, tuple[ExitStack, Node]] = {}
        for ip, more in NODES.items():
            own = stack.enter_context(ExitStack())
            flags = {"num-cpus": 4, "object-store-memory": 80 * MIB, **more}
            there[ip] = own, own.enter_context(ray_worker(directory, head, ip, **flags))

        def kill(ip: str) -> None:
            own, node = there.pop(ip)
            for process in [psutil.Process(node.process.pid), *node.family()]:
                process.kill()
            own.close()

        environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
        ray.init(address=head.gcs, runtime_env={"env_vars": environment}, log_to_driver=False)
        try:
            yield kill
        finally:
            ray.shutdown()


def everything_is_free() -> bool:
    return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@contextmanager
def placed(lines: list[str], **settings: object) -> Iterator[Supervisor]:
    """A system that is ready. It begins when Ray has noticed that the one before has gone."""
    wait_until(everything_is_free, START_S, "all CPUs are free")
    hosts = {f"{role}.host": "0.0.0.0" for role in ROLES}  # each node is reached at its own address
    config = Config().override(**{"engine.threads": 1, "ray.pin_cores": False, **hosts, **settings})
    supervisor = Supervisor(Plan(config, serve_paths=ROLES), {}, lines.append)
    try:
        supervisor.start(START_S)
        yield supervisor
    finally:
        supervisor.close(5)


def where(supervisor: Supervisor, role: str) -> Counter[str]:
    """How many of a role there are on each node."""
    return Counter(member.info.node_ip for member in supervisor.roster.of(role) if member.info)


@pytest.mark.usefixtures("lose")
def test_decode_workers_are_spread() -> None:
    with placed([], **{"ray.placement": "spread", "decode.replicas": 2}) as supervisor:
        assert len(where(supervisor, "decode")) == 2


@pytest.mark.usefixtures("lose")
def test_a_pair_is_packed() -> None:
    """Two workers of two CPUs fill a node: each pair has one."""
    two = {"prefill.replicas": 2, "prefill.num_cpus": 2, "decode.replicas": 2, "decode.num_cpus": 2}
    with placed([], **{"ray.placement": "pack", **two}) as supervisor:
        assert where(supervisor, "prefill") == where(supervisor, "decode") == Counter({ONE: 1, OTHER: 1})


@pytest.mark.usefixtures("lose")
def test_labels_memory_and_resources_choose_the_node() -> None:
    claims = {"prefill.resource": "fast", "decode.memory_mib": 1000, "gateway.labels": ["zone=b"]}
    with placed([], **claims) as supervisor:
        found = {role: set(where(supervisor, role)) for role in ROLES}
        assert found == {"prefill": {ONE}, "decode": {OTHER}, "gateway": {OTHER}}


@pytest.mark.usefixtures("lose")
def test_what_nobody_offers_is_told() -> None:
    lines: list[str] = []
    config = Config().override(**{"engine.threads": 1, "decode.labels": ["zone=nowhere"]})
    supervisor = Supervisor(Plan(config, serve_paths=ROLES), {}, lines.append)
    stop = threading.Event()
    thread = threading.Thread(target=lambda: supervise(supervisor, stop))
    thread.start()
    try:
        wait_until(lambda: any("decode-0 (no process yet)" in line for line in lines), 40, "it is told who waits")
        (decode,) = supervisor.roster.of("decode")
        assert "a node with zone=nowhere" in decode.detail(time.monotonic())
    finally:
        stop.set()
        thread.join(30)
        supervisor.close(5)


def supervise(supervisor: Supervisor, stop: threading.Event) -> None:
    with pytest.raises(StartInterruptedError):
        supervisor.start(START_S, stop.is_set)


def test_workers_of_a_lost_node_come_back_elsewhere(lose: Callable[[str], None]) -> None:
    """The last test: the node does not come back."""
    lines: list[str] = []
    # Decode workers are too large for the head, and both fit on a node.
    sizes = {"decode.replicas": 2, "decode.num_cpus": 1.5, "prefill.num_cpus": 0.25, "gateway.num_cpus": 0.25}
    with placed(lines, **{"ray.placement": "spread", **sizes}) as supervisor:
        assert where(supervisor, "decode") == Counter({ONE: 1, OTHER: 1})
        lost = next(member for member in supervisor.roster.of("decode") if member.info and member.info.node_ip == ONE)
        before = lost.address
        lose(ONE)

        def back() -> bool:
            supervisor.round()
            return all(m.ready for m in supervisor.members) and lost.address != before

        wait_until(back, 120, "all are ready again")
        assert where(supervisor, "decode") == Counter({OTHER: 2})
        assert any("decode" in line and ("died" in line or "takes its place" in line) for line in lines)
