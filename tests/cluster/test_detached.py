"""A detached system outlives the process that started it, and ends when it is told to."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from cluster_helpers import ROOT, listens, nothing_left, wait_until
from e2e_model import save_served_model
from ray_nodes import Node, ray_head, remove_all

from branchline.client import Client
from branchline.config import to_mapping
from cluster.cli import main

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Node]:  # noqa: ARG001 - pytest's own directory comes first
    with nothing_left() as directory:
        try:
            with ray_head(directory, **{"num-cpus": 4, "object-store-memory": 100 << 20}) as node:
                yield node
        finally:
            remove_all(directory)


def serve(head: Node, config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "serve", "--config", str(config), "--ray-address", head.gcs, *flags]
    return subprocess.run(command, cwd=ROOT, env=head.env, capture_output=True, text=True, timeout=150, check=False)


def actors(head: Node) -> list[psutil.Process]:
    found = []
    for process in head.family():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if any(name in " ".join(process.cmdline()) for name in ("RoleActor", "Launcher")):
                found.append(process)
    return found


def test_it_runs_on_until_it_is_stopped(head: Node, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(to_mapping(save_served_model(tmp_path).config())))
    done = serve(head, config, "--detach")
    assert done.returncode == 0, done.stderr
    (gateway,) = [line.removeprefix("ready grpc=") for line in done.stdout.splitlines()]
    (control,) = [line.partition("control at ")[2] for line in done.stderr.splitlines() if "control at " in line]
    left = actors(head)
    assert len(left) == 4

    with Client(gateway) as client:
        assert client.complete(prompt="a bad cab", max_tokens=8, ignore_eos=True).usage.completion_tokens == 8
    assert main(["status", "--json", "--control", control]) == 0
    workers = json.loads(capsys.readouterr().out)["workers"]
    assert [worker["id"] for worker in workers] == ["prefill-0", "decode-0", "gateway-0"]
    again = serve(head, config, "--detach")
    assert again.returncode == 1
    assert "there is a detached system in this cluster already" in again.stderr

    assert main(["stop", "--grace", "1", "--control", control]) == 0
    wait_until(lambda: not listens(gateway), 20, "the port is closed")
    wait_until(lambda: not any(actor.is_running() for actor in left), 30, "the actors have ended")

    config.write_text(config.read_text().replace("tree: default", "tree: nonsense"))
    failed = serve(head, config, "--detach", "--tree", "nonsense")
    assert failed.returncode == 2, failed.stderr
    assert "tree" in failed.stderr.splitlines()[-1]
    wait_until(lambda: not actors(head), 30, "nothing is left of it")
