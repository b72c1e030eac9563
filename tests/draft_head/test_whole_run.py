"""The tool as a user runs it: every stage, on a tiny model, in processes of their own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_chat import save_chat_model

from branchline.config import Config
from branchline.core import Request
from branchline.engine.assemble import assemble
from branchline.engine.offline import Pipeline
from tools.draft_head.__main__ import main
from tools.draft_head.questions import ROOT
from tools.draft_head.recipe import RECIPES, Recipe, dump, load
from tools.draft_head.store import Work

pytestmark = [pytest.mark.models, pytest.mark.timeout(240)]


def command(work: Path, stage: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tools.draft_head", stage, "--work", str(work), *flags]


def call(work: Path, stage: str, *flags: str) -> str:
    """Runs a stage to its end; what it said."""
    done = subprocess.run(command(work, stage, *flags), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def digests(work: Path) -> dict[str, str]:
    return {
        str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(work.rglob("*"))
        if path.is_file()
    }


def tiny_recipe(model: Path) -> Recipe:
    return dataclasses.replace(load(RECIPES / "tiny.yaml"), model=str(model))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A work directory after `all`."""
    root = tmp_path_factory.mktemp("whole")
    model = save_chat_model(root / "model")
    (root / "recipe.yaml").write_text(dump(tiny_recipe(model)))
    said = call(root / "work", "all", "--recipe", str(root / "recipe.yaml"))
    assert [line for line in said.splitlines() if line.startswith("== ") and "took" not in line] == [
        f"== {stage}" for stage in ("data", "features", "train", "export", "evaluate")
    ]
    return Work(root / "work")


def test_the_head_is_one_that_the_engine_serves(trained: Work) -> None:
    recipe = load(trained.recipe)
    names = {"model": recipe.model, "draft": str(trained.head), "provider": "reference", "dtype": "float32"}
    config = Config().override(**{f"model.{name}": value for name, value in names.items()} | {"model.device": "cpu"})
    config = config.override(**{"engine.kv_cache_mib": 32, "engine.max_model_len": 256, "engine.threads": 1})
    models, tree = assemble(config)
    evaluation = json.loads(trained.evaluation.read_text())
    assert tree.spec == "default"
    assert tree.num_nodes in {entry["nodes"] for entry in evaluation["trees"].values()} - {0}
    assert models.draft is not None
    assert models.draft.spec.draft_vocab_size == recipe.train.draft_vocab
    request = Request("one", (1, 60, 61), 32)
    with torch.inference_mode():
        drafted = Pipeline(models, tree, config.engine).run([request])["one"]
        plain = assemble(config.override(**{"model.tree": "none"}))
        assert Pipeline(*plain, config.engine).run([request])["one"].token_ids == drafted.token_ids


def test_the_head_learned_something(trained: Work) -> None:
    entries = [json.loads(line) for line in trained.log.read_text().splitlines()]
    losses = [entry["loss"][0] for entry in entries if "loss" in entry]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]


def test_its_card_says_what_it_is(trained: Work) -> None:
    card = (trained.head / "README.md").read_text()
    for part in ("**Data.**", "answer tokens", "**Training.**", "**How good it is.**", "`best:4`", "**Licence.**"):
        assert part in card
    assert str(trained.root) not in card
    for line in (trained.head / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((trained.head / name).read_bytes()).hexdigest() == digest


def test_a_second_call_finds_nothing_to_do(trained: Work) -> None:
    before = digests(trained.root)
    assert main(["all", "--work", str(trained.root)]) == 0
    assert digests(trained.root) == before


def test_another_recipe_is_refused_by_the_field(trained: Work, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--work", str(trained.root), "--seed", "99"]) == 2
    assert "was begun with seed: 0, not 99" in capsys.readouterr().err


def test_a_run_that_is_killed_again_and_again_makes_the_same_head(trained: Work, tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    recipe = load(trained.recipe)
    often = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, checkpoint_every_s=0.0))
    (tmp_path / "recipe.yaml").write_text(dump(often))
    flags = ["--recipe", str(tmp_path / "recipe.yaml")]
    for begun in (work.data_shards, work.feature_shards, work.checkpoint.exists):
        process = subprocess.Popen(command(work.root, "all", *flags), cwd=ROOT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not begun():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not work.head.exists()  # nobody came so far
    for stage in ("train", "export"):
        assert main([stage, "--work", str(work.root), *flags]) == 0
    one, other = digests(trained.root), digests(work.root)
    names = [name for name in one if name.startswith(("data/", "features/", "head/model", "head/config"))]
    assert len(names) > 4
    assert {name: other.get(name) for name in names} == {name: one[name] for name in names}


def test_make_hands_its_arguments_on() -> None:
    shown = subprocess.run(
        ["make", "-n", "draft-head", "STAGE=train", "ARGS=--work here --threads 2"],
        cwd=ROOT,
        env=os.environ | {"MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "-m tools.draft_head train --work here --threads 2" in shown
