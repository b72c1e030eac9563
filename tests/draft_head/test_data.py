"""Data: a tiny model writes conversations, the same ones whenever it is asked to, and keeps what the head will read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import tiny_chat
import torch
from safetensors.torch import load_file
from tiny_chat import save_chat_model

from branchline.config import Config, ConfigError
from branchline.core import Request, SamplingParams
from branchline.engine.assemble import assemble
from branchline.engine.models.protocol import Models
from branchline.engine.offline import Pipeline
from branchline.engine.tree_spec import parse_tree
from tools.draft_head import data, features, recipe
from tools.draft_head.chat_format import ChatFormat
from tools.draft_head.recipe import DataRecipe, Recipe
from tools.draft_head.segments import Segment, Voice
from tools.draft_head.store import Conversation, Work
from tools.draft_head.writer import LOOP_TOKENS, Order, Writer

pytestmark = pytest.mark.models

SETTINGS = DataRecipe(
    tokens=6000,
    shard_conversations=40,
    in_flight=8,
    max_answer_tokens=24,
    max_prompt_tokens=400,
    temperatures=(0.0, 0.7, 1.0),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    model = save_chat_model(tmp_path_factory.mktemp("model"))
    return Recipe(
        seed=1, model=str(model), provider="reference", device="cpu", dtype="float32", threads=1, data=SETTINGS
    )


@pytest.fixture(scope="module")
def finished(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Work:
    work = Work(tmp_path_factory.mktemp("work"))
    data.run(work, tiny, print)
    return work


def conversations(work: Work) -> list[Conversation]:
    return [one for path in work.data_shards() for one in work.open_conversations(path)]


def files(work: Work) -> dict[str, bytes]:
    return {str(path.relative_to(work.root)): path.read_bytes() for path in work.root.rglob("0*.*")}


def silent(_: str) -> None:
    pass


def test_there_is_what_was_asked_for(finished: Work) -> None:
    written = conversations(finished)
    assert len(finished.data_shards()) > 1
    assert sum(one.learned for one in written) >= SETTINGS.tokens
    assert len({one.id for one in written}) == len(written)
    assert len({one.prompt for one in written}) == len(written)
    assert all(len(one.prompt) <= 400 and 1 <= len(one.answer) <= 24 for one in written)
    temperatures = Counter(one.temperature for one in written)
    assert set(temperatures) == {0.0, 0.7, 1.0}
    assert max(temperatures.values()) < 2 * min(temperatures.values())
    assert {one.kind for one in written} >= {"chat", "seeded", "translate", "summarize", "passage_qa", "multi"}


def test_prompts_are_those_of_the_chat_template(finished: Work, tiny: Recipe) -> None:
    chats = ChatFormat.of(Path(tiny.model))
    for one in conversations(finished):
        text = chats.tokenizer.decode(one.prompt)
        assert text.startswith("<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>user\n") == text.count("<|im_start|>assistant\n")
        assert 0 not in one.answer[:-1], "an answer goes on behind its end"
        begun = chats.tokenizer.decode(one.prompt[: one.begun])
        assert begun.startswith("<|im_start|>user\n")
        assert "assistant" not in begun


def test_a_question_ends_with_its_mark_or_at_its_limit(finished: Work, tiny: Recipe) -> None:
    chats = ChatFormat.of(Path(tiny.model))
    marks = chats.tokens_with("?")
    asked = [one for one in conversations(finished) if one.kind == "question"]
    turns = [one.prompt[one.begun : -len(chats.to_answer)] for one in asked]
    assert not any(marks & set(turn[:-1]) for turn in turns)
    assert any(turn[-1] in marks for turn in turns)
    assert all(turn[-1] in marks or len(turn) <= 40 for turn in turns)


def test_passages_are_as_long_as_they_were_to_be(finished: Work) -> None:
    """A tiny model would end them at once."""
    written = conversations(finished)
    room = 400 - 80
    longest = max(len(one.prompt) for one in written if one.kind == "summarize")
    assert 0.5 * room < longest
    assert all(len(one.prompt) > 0.2 * room for one in written if one.kind == "summarize")


def test_answers_are_the_models_own(finished: Work, tiny: Recipe) -> None:
    """Greedy ones, against an engine that takes one request at a time."""
    models = load(tiny)
    greedy = [one for one in conversations(finished) if one.temperature == 0.0]
    assert {one.kind for one in greedy} >= {"summarize", "chat"}
    ends = models.target.spec.eos_token_ids
    requests = [
        Request(str(one.id), one.prompt, max(24, len(one.answer)), SamplingParams(), stop_token_ids=ends)
        for one in greedy
    ]
    config = Config().override(**{"engine.kv_cache_mib": 8, "engine.max_model_len": 512})
    outputs = Pipeline(models, parse_tree("none"), config.engine).run(requests)
    assert {one.id: list(one.answer) for one in greedy} == {int(name): out.token_ids for name, out in outputs.items()}


def load(tiny: Recipe) -> Models:
    settings = {"model.model": tiny.model, "model.provider": "reference", "model.dtype": "float32"}
    settings |= {"model.draft": "none", "model.tree": "none", "model.device": "cpu"}
    return assemble(Config().override(**settings))[0]


@pytest.mark.parametrize("answer", [True, False])
def test_nobody_goes_on_from_what_repeats_itself(tiny: Recipe, answer: bool) -> None:
    """An answer that does is the last one; a user turn that does is no turn."""
    others = frozenset(range(tiny_chat.VOCAB)) - {7}
    loop = Segment((3, 4), 100, Voice(1.0), frozenset(), banned=others, answer=answer)
    rest = Segment((5,), 4, Voice(0.0), frozenset(), answer=True)
    writer = Writer(features.load_for_features(tiny, silent), (3,), 2, lambda _: True)
    writer.submit(Order("looped", (loop, rest), "seed"))
    ended = []
    while writer.busy:
        ended += [(written.tokens, written.answer) for written in writer.step()]
    assert ended == ([((3, 4, *[7] * LOOP_TOKENS), 2)] if answer else [])
    assert writer.dropped == (0 if answer else 1)


def test_features_are_kept_as_they_would_be_computed(finished: Work, tiny: Recipe) -> None:
    models = features.load_for_features(tiny, silent)
    for shard in finished.data_shards():
        entries = list(finished.open_conversations(shard))
        kept, expected = load_file(finished.feature_shard(shard)), features.compute(models, entries, 512)
        assert kept.keys() == expected.keys()
        read = torch.ones(len(kept["tokens"]), dtype=torch.bool)
        read[kept["starts"][1:] - 1] = False  # a conversation's last token was never read
        for name in ("tokens", "starts", "begun"):
            assert torch.equal(kept[name], expected[name]), name
        assert torch.equal(kept["choices"][read], expected["choices"][read])
        for name in ("auxiliary", "hidden"):
            torch.testing.assert_close(kept[name][read], expected[name][read], rtol=1e-2, atol=1e-3)


def test_a_run_that_was_stopped_goes_on_with_the_same_text(finished: Work, tiny: Recipe, tmp_path: Path) -> None:
    work = Work(tmp_path)
    data.run(work, dataclasses.replace(tiny, data=dataclasses.replace(SETTINGS, tokens=1)), silent)
    assert len(work.data_shards()) == 1
    data.run(work, tiny, silent)
    assert files(work) == files(finished)


def test_processes_side_by_side_write_the_same_text(finished: Work, tiny: Recipe, tmp_path: Path) -> None:
    """Each shard may begin before another one has enough, so there may be one more."""
    work = Work(tmp_path)
    data.run(work, dataclasses.replace(tiny, data=dataclasses.replace(SETTINGS, processes=2)), silent)
    ours, theirs = files(work), files(finished)
    assert theirs.items() <= ours.items()
    assert len(work.data_shards()) <= len(finished.data_shards()) + 1


def test_a_process_that_fails_ends_the_run(tiny: Recipe, tmp_path: Path) -> None:
    work = Work(tmp_path)
    (work.feature_shard(work.data_shard(1)) / "in the way").mkdir(parents=True)
    both = dataclasses.replace(tiny, data=dataclasses.replace(SETTINGS, processes=2))
    with pytest.raises(ConfigError, match=r"data\.processes: 1 of them failed, with exit code 1"):
        data.run(work, both, silent)
    assert not work.data_shard(1).exists()


def test_a_finished_run_loads_no_model(finished: Work, tiny: Recipe) -> None:
    data.run(finished, dataclasses.replace(tiny, model="/nowhere"), silent)


def test_another_seed_says_something_else(finished: Work, tiny: Recipe, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny, seed=2, data=dataclasses.replace(SETTINGS, tokens=1))
    data.run(Work(tmp_path), other, silent)
    ours, theirs = conversations(finished), conversations(Work(tmp_path))
    assert not {one.prompt for one in ours} & {one.prompt for one in theirs if len(one.prompt) > 60}


def test_plans_that_never_fit_end_the_run(tiny: Recipe, tmp_path: Path) -> None:
    small = dataclasses.replace(SETTINGS, max_prompt_tokens=16, shard_conversations=4)
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens: nothing fits 16"):
        data.run(Work(tmp_path), dataclasses.replace(tiny, data=small), silent)


def test_the_shares_are_kept() -> None:
    shares = dict.fromkeys(("summarize", "passage_qa", "multi", "question", "math", "seeded"), 0.0)
    settings = DataRecipe(shares=recipe.Shares(**shares, chat=3, translate=1))
    studio = data.Studio(Recipe(data=settings), None)  # type: ignore[arg-type]
    kinds = Counter(studio.kind(number) for number in range(2000))
    assert set(kinds) == {"chat", "translate"}
    assert 1400 < kinds["chat"] < 1600
