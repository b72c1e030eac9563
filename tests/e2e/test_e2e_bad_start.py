"""What a user can get wrong before anything runs: every process says so in one line and exits with 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_helpers import Fleet
from e2e_model import TinyModel
from model_helpers import edit_config, edit_tensors, head_tensors

from benchmarks.local_system import REPOSITORY
from branchline.config import to_mapping

pytestmark = [pytest.mark.wire, pytest.mark.timeout(120)]

WORKER = ("-m", "decode_worker")
GATEWAY = ("-m", "gateway")
SERVE = ("-m", "cluster.cli", "serve", "--ray-address", "local")

#: "Within seconds" on an idle machine, most of them imports; others may be at work here.
TOLD_S = 45.0


def told(command: Sequence[str], config: Path) -> str:
    """The one line about the mistake; nothing but progress is said before it."""
    done = subprocess.run(
        [sys.executable, *command, "--config", str(config)],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TOLD_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    *progress, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert not any("error" in other.lower() or "Traceback" in other for other in progress), done.stderr
    return line.removeprefix("error: ")


def written(tmp_path: Path, tiny: TinyModel, **flags: Any) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_mapping(tiny.config(**flags))))
    return file


@pytest.fixture
def without_weights(tiny: TinyModel, tmp_path: Path) -> Path:
    shutil.copytree(tiny.model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "empty"


@pytest.fixture
def other_head(tiny: TinyModel, tmp_path: Path) -> Path:
    """A head for a target of another hidden size."""
    shutil.copytree(tiny.head, tmp_path / "head")
    edit_config(tmp_path / "head", hidden_size=64, head_dim=16)
    edit_tensors(tmp_path / "head", {"fc.weight": head_tensors()["fc.weight"].repeat(2, 2)})
    return tmp_path / "head"


def test_a_model_without_weights(tiny: TinyModel, tmp_path: Path, without_weights: Path) -> None:
    line = told(WORKER, written(tmp_path, tiny, **{"model.model": str(without_weights)}))
    assert str(without_weights) in line
    assert "weights" in line


def test_a_head_of_another_hidden_size(tiny: TinyModel, tmp_path: Path, other_head: Path) -> None:
    line = told(WORKER, written(tmp_path, tiny, **{"model.draft": str(other_head)}))
    assert "draft head" in line
    assert "hidden size 64" in line
    assert "32" in line


def test_a_tree_that_is_not_connected(tiny: TinyModel, tmp_path: Path) -> None:
    line = told(WORKER, written(tmp_path, tiny, **{"model.tree": "[[0], [1, 0]]"}))
    assert line == "model.tree: not connected: [1, 0] is there without [1]"


def test_a_tree_file_that_is_not_there(tiny: TinyModel, tmp_path: Path) -> None:
    line = told(WORKER, written(tmp_path, tiny, **{"model.tree": "static:/nowhere.json"}))
    assert line == "model.tree: /nowhere.json: No such file or directory"


def test_a_model_without_tokenizer(tiny: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    line = told(GATEWAY, written(tmp_path, tiny, **{"model.model": str(tmp_path / "mute")}))
    assert "tokenizer can't be loaded" in line


@pytest.mark.parametrize("role", ["prefill", "decode", "gateway"])
def test_a_busy_port(one_of_each: Fleet, tiny: TinyModel, tmp_path: Path, role: str) -> None:
    """A port that another worker, or another gateway, serves on."""
    addresses = {worker.role: worker.address for worker in one_of_each.client.info().workers}
    addresses["gateway"] = one_of_each.client.target
    port = int(addresses[role].rpartition(":")[2])
    flags: dict[str, Any] = {f"{role}.{'grpc_port' if role == 'gateway' else 'port'}": port}
    if role == "gateway":
        flags |= {f"gateway.{other}_workers": [addresses[other]] for other in ("prefill", "decode")}
    line = told(("-m", role if role == "gateway" else f"{role}_worker"), written(tmp_path, tiny, **flags))
    assert line == f"port {port} on 127.0.0.1 is in use by another process"


@pytest.mark.parametrize("command", [WORKER, ("-m", "prefill_worker"), GATEWAY, SERVE], ids=lambda command: command[1])
class TestEveryCommand:
    def test_a_missing_file(self, command: Sequence[str]) -> None:
        assert told(command, Path("/nowhere.yaml")) == "/nowhere.yaml: No such file or directory"

    def test_an_unknown_field(self, command: Sequence[str], tmp_path: Path) -> None:
        file = tmp_path / "config.yaml"
        file.write_text("model: {modle: default}\n")
        assert told(command, file).startswith("model.modle: unknown field; known are model, draft, dtype")

    def test_a_file_that_is_no_yaml(self, command: Sequence[str], tmp_path: Path) -> None:
        file = tmp_path / "config.yaml"
        file.write_text("model: [\n")
        assert told(command, file).startswith(f"{file}: not valid YAML")


@pytest.mark.cluster
class TestServe:
    """Mistakes that the workers find: told by `branchline serve` as if they were its own."""

    def test_a_model_without_weights(self, tiny: TinyModel, tmp_path: Path, without_weights: Path) -> None:
        line = told(SERVE, written(tmp_path, tiny, **{"model.model": str(without_weights)}))
        assert str(without_weights) in line

    def test_a_head_of_another_hidden_size(self, tiny: TinyModel, tmp_path: Path, other_head: Path) -> None:
        line = told(SERVE, written(tmp_path, tiny, **{"model.draft": str(other_head)}))
        assert "hidden size 64" in line
