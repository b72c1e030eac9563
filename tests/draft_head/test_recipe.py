"""The recipe, and the work directory that remembers it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from branchline.config import ConfigError
from tools.draft_head import recipe as recipes
from tools.draft_head.__main__ import main
from tools.draft_head.recipe import RECIPES, DataRecipe, Recipe, TrainRecipe
from tools.draft_head.store import Conversation, Work
from tools.draft_head.writer import loops

CONVERSATION = Conversation(1, "chat", 0.7, (1, 2), (3, 4), 1)


def test_the_recipes_that_come_along_can_be_read() -> None:
    for path in RECIPES.glob("*.yaml"):
        recipes.load(path)


def test_a_recipe_survives_the_file(tmp_path: Path) -> None:
    written = Recipe(seed=3, data=DataRecipe(temperatures=(0.0, 1.0)), train=TrainRecipe(learning_rate=1e-3))
    (tmp_path / "recipe.yaml").write_text(recipes.dump(written))
    assert recipes.load(tmp_path / "recipe.yaml") == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dat: {}", "dat: unknown field"),
        ("data: {token: 3}", "data.token: unknown field"),
        ("data: {shares: {chats: 1}}", "data.shares.chats: unknown field"),
        ("data: {shares: {chat: -1}}", "data.shares.chat: must be at least 0"),
        ("data: {temperatures: [hot]}", "data.temperatures: must be a list of numbers"),
        ("data: {temperatures: [-1]}", "data.temperatures: must be"),
        ("data: {in_flight: 0}", "data.in_flight: must be at least 1"),
        ("train: {warmup: 1.5}", "train.warmup: must be below 1"),
        ("train: {epochs: 0}", "train.epochs: must be above 0"),
        ("evaluate: {budgets: [0]}", "evaluate.budgets: must be at least 1"),
        ("provider: mine", "provider: must be one of"),
        ("seed: no", "seed: must be of type int"),
        ("[1", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="^(.*: )?" + message.replace(".", r"\.")):
        recipes.load(path)


def test_no_share_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    kinds = [entry.name for entry in dataclasses.fields(recipes.Shares)]
    path.write_text("data: {shares: {" + ", ".join(f"{kind}: 0" for kind in kinds) + "}}")
    with pytest.raises(ConfigError, match=r"data\.shares: at least one"):
        recipes.load(path)


def begun(work: Work, recipe: Recipe) -> Work:
    work.begin(recipe)
    work.write_conversations(work.data_shard(0), [CONVERSATION])
    return work


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed: 0, not 5"),
        ({"model": "other"}, "model: 'default', not 'other'"),
        ({"data": DataRecipe(max_answer_tokens=64)}, "data.max_answer_tokens: 144, not 64"),
        ({"data": DataRecipe(shares=recipes.Shares(math=0))}, "data.shares.math: 2.5, not 0"),
    ],
)
def test_another_recipe_for_what_is_there_is_refused(tmp_path: Path, change: dict[str, object], named: str) -> None:
    work = begun(Work(tmp_path), Recipe())
    with pytest.raises(ConfigError, match=named):
        work.begin(dataclasses.replace(Recipe(), **change))  # type: ignore[arg-type]
    assert recipes.load(work.recipe) == Recipe()


def test_what_changes_nothing_that_is_there_may_change(tmp_path: Path) -> None:
    changed = Recipe(provider="reference", data=DataRecipe(tokens=9), train=TrainRecipe(epochs=9))
    work = begun(Work(tmp_path), Recipe())
    work.begin(changed)
    assert recipes.load(work.recipe) == changed


def test_before_anything_is_there_all_may_change(tmp_path: Path) -> None:
    Work(tmp_path).begin(Recipe())
    Work(tmp_path).begin(Recipe(seed=1))


def test_conversations_survive_the_file_and_give_the_same_bytes(tmp_path: Path) -> None:
    one, other = Work(tmp_path / "one"), Work(tmp_path / "other")
    for work in (one, other):
        work.write_conversations(work.data_shard(2), [CONVERSATION])
    assert list(one.open_conversations(one.data_shard(2))) == [CONVERSATION]
    assert one.data_shard(2).read_bytes() == other.data_shard(2).read_bytes()


def test_the_conversations_that_come_along_are_those_of_the_recipe(tmp_path: Path) -> None:
    paths = sorted((RECIPES.parent / "conversations").glob("*.gz"))
    work = Work(tmp_path)
    entries = [entry for path in paths for entry in work.open_conversations(path)]
    shipped = recipes.load(RECIPES / "shipped.yaml")
    assert sum(entry.learned for entry in entries) >= shipped.data.tokens
    # One that repeats itself is the last, wherever it was to stand, and has another limit there.
    limit = shipped.data.max_answer_tokens
    assert all(len(entry.answer) <= limit or loops(entry.answer) for entry in entries)
    assert {entry.temperature for entry in entries} == set(shipped.data.temperatures)


def test_a_file_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    work = Work(tmp_path)

    def stopped() -> None:
        with work.writing(work.data_shard(0)) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert work.data_shards() == []


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {tokens: many}")
    assert main(["data", "--work", str(tmp_path), "--recipe", str(path)]) == 2
    assert capsys.readouterr().err == "error: data.tokens: must be of type int, got 'many'\n"
