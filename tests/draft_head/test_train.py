"""Features, training and export on a tiny model: the right numbers, resumable, and loadable by both providers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_helpers import HIDDEN, VOCAB, DenseAttention, save_tiny_model
from safetensors.torch import load_file

from branchline.config import ConfigError, EngineConfig, ModelConfig
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import ModelError
from tools.draft_head import export, features, train
from tools.draft_head.batches import Batch, cut_batches, schedule
from tools.draft_head.recipe import FeaturesRecipe, Recipe, TrainRecipe
from tools.draft_head.store import Conversation, Work
from tools.draft_head.trainer import Trainer, learning_rate
from tools.draft_head.vocabulary import choose, count_tokens, read

pytestmark = pytest.mark.models

LENGTHS = [(5, 12), (1, 9), (9, 2), (20, 30), (3, 1), (7, 15), (30, 20), (2, 25), (6, 6), (4, 40)]


def conversations() -> list[Conversation]:
    """Answers that repeat themselves, so that there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    entries = []
    for index, (prompt, answer) in enumerate(LENGTHS * 3):
        ids = torch.randint(3, VOCAB, (prompt + 4,), generator=generator).tolist()
        answered = tuple((ids[prompt:] * 10)[:answer])
        entries.append(Conversation(index, "chat", 0.0, tuple(ids[:prompt]), answered, max(1, prompt - index % 3)))
    return entries


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory)
    return directory


@pytest.fixture
def recipe(model: Path) -> Recipe:
    settings = TrainRecipe(
        draft_vocab=40, epochs=6, ttt_steps=3, batch_tokens=64, learning_rate=3e-3, checkpoint_every_s=0, log_every=1
    )
    return Recipe(
        model=str(model),
        provider="reference",
        device="cpu",
        dtype="float32",
        threads=1,
        features=FeaturesRecipe(max_tokens_per_pass=50),
        train=settings,
    )


@pytest.fixture
def work(tmp_path: Path, recipe: Recipe) -> Work:
    work, entries = Work(tmp_path / "work"), conversations()
    work.write_conversations(work.data_shard(0), entries[:20])
    work.write_conversations(work.data_shard(1), entries[20:])
    features.run(work, recipe, print)
    return work


def test_features_are_what_the_target_computes(work: Work, recipe: Recipe) -> None:
    """Each conversation alone, in one pass of a dense attention."""
    models = features.load_for_features(recipe, print)
    tensors = load_file(work.feature_shards()[1])
    for index, entry in enumerate(conversations()[20:]):
        start, end = tensors["starts"][index : index + 2].tolist()
        ids = torch.tensor([*entry.prompt, *entry.answer])
        with torch.inference_mode():
            output = models.target.forward(ids, torch.arange(len(ids)), DenseAttention())
            logits = models.target.logits(output.hidden)
        assert tensors["tokens"][start:end].tolist() == ids.tolist()
        assert tensors["begun"][index] == entry.begun
        torch.testing.assert_close(tensors["hidden"][start:end], output.hidden.bfloat16(), rtol=1e-2, atol=1e-2)
        assert output.auxiliary is not None
        torch.testing.assert_close(tensors["auxiliary"][start:end], output.auxiliary.bfloat16(), rtol=1e-2, atol=1e-2)
        choices = tensors["choices"][start:end]
        assert (choices[: entry.begun] == -1).all()
        assert choices[entry.begun :].tolist() == logits.argmax(-1)[entry.begun :].tolist()


def test_features_go_on_where_they_stopped(work: Work, recipe: Recipe) -> None:
    first, second = work.feature_shards()
    before, written = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    features.run(work, recipe, print)
    assert second.read_bytes() == before
    assert first.stat().st_mtime_ns == written
    lines: list[str] = []
    features.run(work, recipe, lines.append)
    assert lines == ["features: all 2 files are there"]


def test_a_stopped_training_ends_with_the_same_head(
    work: Work, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Work(tmp_path / "whole")
    whole.root.mkdir()
    whole.features.symlink_to(work.features)
    train.run(whole, recipe, print)

    learn, steps = Trainer.learn, 0

    def stops(trainer: Trainer, batch: Batch, rate: float, *, measure: bool) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return learn(trainer, batch, rate, measure=measure)

    monkeypatch.setattr(Trainer, "learn", stops)
    with pytest.raises(KeyboardInterrupt):
        train.run(work, recipe, print)
    assert torch.load(work.checkpoint)["step"] == 7
    monkeypatch.setattr(Trainer, "learn", learn)
    train.run(work, recipe, print)

    ours, theirs = (torch.load(entry.checkpoint) for entry in (work, whole))
    assert ours["step"] == theirs["step"] > 20
    assert all(torch.equal(ours["head"][name], tensor) for name, tensor in theirs["head"].items())
    assert work.log.read_text() == whole.log.read_text()
    log = [json.loads(line) for line in whole.log.read_text().splitlines()]
    losses = [entry["loss"][0] for entry in log if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert any("held_out" in entry for entry in log)

    lines: list[str] = []
    train.run(work, recipe, lines.append)
    assert lines[-1].endswith("steps are done")


@pytest.mark.parametrize("provider", ["reference", "vllm"])
def test_the_export_loads(work: Work, recipe: Recipe, provider: str) -> None:
    if provider == "vllm":
        pytest.importorskip("vllm")
    recipe = replace(recipe, train=replace(recipe.train, epochs=1))
    train.run(work, recipe, print)
    export.run(work, recipe, print)
    config = ModelConfig(recipe.model, str(work.head), "float32", provider, "cpu")
    models = load_models(config, EngineConfig())
    assert models.draft is not None
    assert models.draft.spec.draft_vocab_size == 40
    assert torch.equal(models.draft.target_token_ids, read(work.vocabulary).target_token_ids)
    trained = torch.load(work.checkpoint)["head"]
    states = torch.randn(3, 3 * HIDDEN, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(models.draft.fuse(states), states @ trained["fc.weight"].T, rtol=1e-4, atol=1e-4)


def test_training_goes_on_from_a_head(work: Work, recipe: Recipe, tmp_path: Path) -> None:
    """Its vocabulary stays, and the first loss is near its last, far below a fresh head's."""
    train.run(work, recipe, print)
    export.run(work, recipe, print)
    settings = replace(recipe.train, start=str(work.head), epochs=1, learning_rate=1e-9)
    later = Work(tmp_path / "later")
    later.root.mkdir()
    later.features.symlink_to(work.features)
    train.run(later, replace(recipe, train=settings), print)
    assert torch.equal(read(later.vocabulary).target_token_ids, read(work.vocabulary).target_token_ids)
    before, after = (
        [json.loads(line) for line in entry.log.read_text().splitlines() if "learning_rate" in line]
        for entry in (work, later)
    )
    assert after[0]["loss"][0] < 0.5 * (before[0]["loss"][0] + before[-1]["loss"][0])


def test_more_data_are_refused_once_training_has_begun(work: Work, recipe: Recipe) -> None:
    recipe = replace(recipe, train=replace(recipe.train, epochs=1))
    train.run(work, recipe, print)
    work.write_conversations(work.data_shard(2), conversations()[:9])
    features.run(work, recipe, print)
    with pytest.raises(ConfigError, match=r"begun with the data for .* steps, now they make"):
        train.run(work, recipe, print)


def test_what_is_missing_is_named(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(ModelError, match="nothing to train on"):
        train.run(Work(tmp_path), recipe, print)
    with pytest.raises(ConfigError, match="nothing is trained yet"):
        export.run(Work(tmp_path), recipe, print)


def test_vocabulary_takes_the_most_frequent_and_the_stop_tokens() -> None:
    counts = count_tokens([torch.tensor([5, 5, 1, 7]), torch.tensor([7, 5, 2])], 10)
    assert counts.tolist() == [0, 1, 1, 0, 0, 3, 0, 2, 0, 0]
    vocabulary = choose(counts, 4, (9,))
    assert vocabulary.target_token_ids.tolist() == [1, 5, 7, 9]
    assert vocabulary.coverage == pytest.approx(6 / 7)
    assert choose(counts, 99, ()).target_token_ids.tolist() == list(range(10))


def test_schedule_visits_everything_once_an_epoch() -> None:
    lengths = [3, 9, 4, 4, 12, 1]
    plan = schedule(lengths, 10, 2, seed=1)
    assert plan == schedule(lengths, 10, 2, seed=1) != schedule(lengths, 10, 2, seed=2)
    visited = [index for batch in plan for index in batch]
    assert sorted(visited[:6]) == sorted(visited[6:]) == list(range(6))
    assert visited[:6] != visited[6:]
    assert all(sum(lengths[index] for index in batch) <= 10 or len(batch) == 1 for batch in plan)
    assert schedule(lengths, 10, 1.0, seed=1) == plan[: len(schedule(lengths, 10, 1.0, seed=1))]
    assert cut_batches(range(3), [5, 5, 1], 10) == [[0, 1], [2]]


def test_learning_rate_rises_and_falls() -> None:
    recipe = TrainRecipe(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-2
