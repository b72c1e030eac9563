"""Evaluating a head: a run that was stopped goes on, and ends as one that was not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from model_helpers import head_config, head_tensors, save_head
from tiny_chat import VOCAB, save_chat_model

from branchline.config import Config, ConfigError
from branchline.engine.assemble import settle_tree
from branchline.engine.tree import StaticTree
from tools.draft_head import evaluate, partial, report, rounds
from tools.draft_head.partial import Partial
from tools.draft_head.recipe import EvaluateRecipe, Recipe
from tools.draft_head.store import Work

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """A work directory that holds a head and nothing else."""
    save_head(tmp_path / "work" / "head", head_config(vocab_size=VOCAB), head_tensors() | {"t2d": _known()})
    return Work(tmp_path / "work")


def _known() -> Any:
    import torch

    return (torch.arange(VOCAB) % 2 == 0) & (torch.arange(VOCAB) < 80)


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Recipe:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"question_id": number, "category": "ab"[number // 7], "turns": [f"What is the answer to {number}?"]}
        for number in range(14)
    ]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    settings = EvaluateRecipe(str(prompts), 7, 12, ("chain:2", "dynamic:2,2,4"), (2, 6), (0.0, 0.7))
    return Recipe(1, str(model), "reference", "cpu", "float32", threads=1, evaluate=settings)


def test_it_leaves_figures_a_tree_a_card_and_checksums(work: Work, recipe: Recipe) -> None:
    said: list[str] = []
    evaluate.run(work, recipe, said.append)
    evaluation = json.loads(work.evaluation.read_text())
    assert list(evaluation["trees"]) == ["none", "chain:2", "dynamic:2,2,4", "best:2", "best:6"]
    cases = [(run["tree"], run["temperature"]) for run in evaluation["runs"]]
    assert len(set(cases)) == len(cases) == 5 * 3
    assert evaluation["prompts"] == 7
    plain = report.run_of(evaluation, "none", 0.0)
    assert (plain["acceptance_length"], plain["to_plain"]) == (1.0, 1.0)
    assert set(plain["by_category"]) == {"a", "b"}
    assert evaluation["foreseen"]["prompts"] == 7
    foreseen = [(run["tree"], run["temperature"]) for run in evaluation["foreseen"]["runs"]]
    assert foreseen == [(tree, heat) for tree in ("chain:2", "best:2", "best:6") for heat in (0.0, 0.7)]
    assert all(run["tokens"] <= 7 * 11 for run in evaluation["runs"] if run["temperature"] != "all")
    assert not (work.root / partial.PARTIAL).exists()

    config = Config().override(**{"model.model": recipe.model, "model.draft": str(work.head)})
    chosen = settle_tree(config)
    assert chosen.spec == "default"
    assert chosen.num_nodes == evaluation["trees"][report.fastest(evaluation)]["nodes"]
    for name in ("best:2", "best:6"):
        found = settle_tree(config.override(**{"model.tree": name}))
        assert isinstance(found, StaticTree)
        assert [list(choice) for choice in found.choices] == evaluation["trees"][name]["configured"]

    sums = dict(reversed(line.split()) for line in (work.head / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"config.json", "model.safetensors", "tree.json"}
    assert all(hashlib.sha256((work.head / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    card = (work.head / "README.md").read_text()
    assert report.table(evaluation) in card
    assert "**Licence.**" in card

    before = work.evaluation.read_bytes()
    evaluate.run(work, recipe, said.append)
    assert "this head is evaluated already" in said
    assert work.evaluation.read_bytes() == before


def test_a_stopped_one_goes_on_where_it_was(work: Work, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PART", 2)
    monkeypatch.setattr(rounds, "TOGETHER", 2)
    whole = Work(work.root.parent / "whole")
    (whole.root).mkdir()
    (whole.head).symlink_to(work.head.resolve())
    evaluate.run(whole, recipe, _silent)

    save, left = Partial._save, 0

    def stopping(self: Partial) -> None:
        nonlocal left
        save(self)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "_save", stopping)
    for parts in (1, 2, 3, 4):  # of 4 to foresee at each temperature, and 4 to measure
        left = parts
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(work, recipe, _silent)
        assert not work.evaluation.exists()
    evaluate.run(work, recipe, _silent)
    assert left == -2  # only what was left was done
    one, other = (json.loads(each.evaluation.read_text()) for each in (whole, work))
    assert one["foreseen"] == other["foreseen"]
    assert one["trees"] == other["trees"]
    assert [_timeless(run) for run in one["runs"]] == [_timeless(run) for run in other["runs"]]


def test_another_head_is_another_evaluation(work: Work, recipe: Recipe) -> None:
    small = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, limit=2, temperatures=(0.0,)))
    evaluate.run(work, small, _silent)
    before = json.loads(work.evaluation.read_text())
    tensors = head_tensors() | {"t2d": _known()}
    save_head(work.head, head_config(vocab_size=VOCAB), tensors | {"norm.weight": tensors["norm.weight"] * 2})
    evaluate.run(work, small, _silent)
    after = json.loads(work.evaluation.read_text())
    assert before["key"]["head"] != after["key"]["head"]


def test_what_is_wrong_is_named(work: Work, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no head yet"):
        evaluate.run(Work(tmp_path / "empty"), recipe, _silent)
    for changes, message in (
        ({"prompts": "nowhere.jsonl"}, r"evaluate\.prompts: .*No such file"),
        ({"prompts": str(work.head / "config.json")}, r"evaluate\.prompts: .*not a Spec-Bench file"),
        ({"max_tokens": 1024}, "no prompt leaves room"),
        ({"trees": ("dynamic:2,64,64",)}, "64 guesses, the head knows 40 tokens"),
    ):
        wrong = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, **changes))
        with pytest.raises(ConfigError, match=message):
            evaluate.run(work, wrong, _silent)


def _timeless(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name not in ("seconds", "tokens_per_s", "to_plain")}


def _silent(_: str) -> None:
    pass
