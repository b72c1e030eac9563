"""What the Helm chart starts, started here: the rendered nodes, launcher, configuration and ports on a real Ray.

In place of pods there are Ray nodes as processes, each at a loopback address of its own.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from chart import Objects, render
from cluster_helpers import ROOT, free_port, listens, nothing_left, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from monitoring import PROMETHEUS, named, panel_queries, prometheus, rules
from ray_nodes import Node, ray_head, ray_worker, remove_all

from branchline.client import Client

pytestmark = pytest.mark.cluster

ROLES = ("prefill", "decode", "gateway")
TOKEN = "a-token-of-at-least-thirty-two-characters"


def flags(group: dict[str, Any]) -> dict[str, object]:
    """The flags of `ray start` that KubeRay makes of a group's parameters and resources."""
    resources = dict(group["resources"])
    made: dict[str, object] = {**group["rayStartParams"], "num-cpus": resources.pop("CPU")}
    if "GPU" in resources:
        made["num-gpus"] = resources.pop("GPU")
    if resources:
        made["resources"] = json.dumps({name: float(count) for name, count in resources.items()})
    return made


@contextlib.contextmanager
def nodes(objects: Objects, directory: Path) -> Iterator[dict[str, Node]]:
    """The head and a node for each pod of the groups, by group: the same claims and parameters."""
    env = {
        "RAY_AUTH_MODE": objects.get("RayCluster")["spec"]["authOptions"]["mode"],
        "RAY_AUTH_TOKEN": TOKEN,
        # The other tests' 0 keeps Ray on one node.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        # For machines that are busy otherwise.
        "RAY_raylet_start_wait_time_s": "120",
    }
    head_flags = flags(objects.get("RayCluster")["spec"]["headGroupSpec"]) | {"dashboard-host": "127.0.0.1"}
    with contextlib.ExitStack() as stack:
        running = {"headgroup": stack.enter_context(ray_head(directory, env, "127.0.0.2", **head_flags))}
        for number, (name, group) in enumerate(objects.groups.items(), start=3):
            worker = ray_worker(directory, running["headgroup"], f"127.0.0.{number}", **flags(group))
            running[name] = stack.enter_context(worker)
        yield running


@contextlib.contextmanager
def launcher(
    objects: Objects, head: Node, directory: Path, metrics: dict[str, int]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The launcher's container as a process; its configuration and the head's address are where they are here."""
    config, log = directory / "config.yaml", directory / "launcher.log"
    program = yaml.safe_load(objects.config)
    # Each pod has the port to itself; here the roles share a network.
    assert len({program[role]["metrics_port"] for role in ROLES}) == 1
    for role in ROLES:
        program[role]["metrics_port"] = metrics[role]
    config.write_text(yaml.safe_dump(program))
    (container,) = objects.pods["launcher"]["spec"]["containers"]
    there = {"/etc/branchline/config.yaml": str(config), "http://demo-head-svc:8265": head.dashboard}
    command = [*container["command"], *container["args"]]
    for old, new in there.items():
        assert any(old in word for word in command)
        command = [word.replace(old, new) for word in command]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=head.env, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait(10)
        print(log.read_text())


def probe(objects: Objects, group: str, ip: str, name: str) -> bool:
    """Whether one of a pod's gRPC probes succeeds, as the kubelet would find."""
    (container,) = objects.pods[group]["spec"]["containers"]
    with grpc.insecure_channel(f"{ip}:{container[name]['grpc']['port']}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def check_queries(targets: list[str], directory: Path) -> None:
    """Every metric that an alert or the dashboard names is scraped, and every query is understood."""
    queries = [*panel_queries(), *(rule["expr"] for rule in rules())]
    names = set().union(*map(named, queries))
    assert len(names) > 20
    with prometheus(directory, free_port(), targets) as ask:

        def missing() -> list[str]:
            with contextlib.suppress(OSError):  # it does not answer yet
                return sorted(name for name in names if not ask(name)) + [q for q in panel_queries() if not ask(q)]
            return ["Prometheus"]

        # A rate needs two scrapes.
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not missing(), 30, "all metrics")
        assert missing() == []
        for rule in rules():
            ask(rule["expr"])


def test_what_the_chart_starts_answers() -> None:
    ports = {name: free_port() for name in (*ROLES, "http")}
    metrics = {role: free_port() for role in ROLES}
    objects = render({"ports": {**ports, "metrics": metrics["gateway"]}})
    with nothing_left() as directory:
        try:
            with (
                nodes(objects, directory) as running,
                launcher(objects, running["headgroup"], directory, metrics) as (process, log),
            ):
                wait_until(lambda: "ready grpc=" in log.read_text() or process.poll() is not None, 240, "ready")
                assert process.poll() is None
                (ready,) = [line.split() for line in log.read_text().splitlines() if "ready grpc=" in line]
                # Each role is on the node of its own group, at the rendered port.
                ips = {name: running[name].agent.rpartition(":")[0] for name in ROLES}
                address, http = (f"{ips['gateway']}:{ports[name]}" for name in ("gateway", "http"))
                assert ready == ["ready", f"grpc={address}", f"http={http}"]
                with Client(address) as client:
                    result = client.complete(prompt="The capital of France is", max_tokens=16, timeout=60)
                    workers = {worker.role: worker.address for worker in client.info().workers}
                assert "Paris" in result.text
                assert result.speculation.accepted > 0
                assert workers == {role: f"{ips[role]}:{ports[role]}" for role in ("prefill", "decode")}
                with urllib.request.urlopen(f"http://{http}/v1/models", timeout=10) as response:
                    assert json.load(response)["data"][0]["id"] == "default"

                for role in ROLES:
                    assert probe(objects, role, ips[role], "readinessProbe")
                for group, node in running.items():
                    (container,) = objects.pods[group]["spec"]["containers"]
                    path = container["livenessProbe"]["httpGet"]["path"]
                    # No token, as from the kubelet.
                    with urllib.request.urlopen(f"http://{node.agent}{path}", timeout=10) as response:
                        assert response.status == 200

                if PROMETHEUS:
                    check_queries([f"{ips[role]}:{metrics[role]}" for role in ROLES], directory)

                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                assert not any(map(listens, [address, http, *workers.values()]))
        finally:
            remove_all(directory)
