"""Data: a tiny model writes conversations, the same ones whenever it is asked to."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest
from tiny_chat import save_chat_model

from branchline.config import Config, ConfigError
from branchline.core import Request, SamplingParams
from branchline.engine.assemble import assemble
from branchline.engine.decode import Allocation, DecodeRunner
from branchline.engine.models.locate import locate_model
from branchline.engine.models.protocol import ModelError, Models
from branchline.engine.offline import Pipeline
from branchline.engine.step import Step
from branchline.engine.tree_spec import parse_tree
from tools.draft_head import data, recipe
from tools.draft_head.chat_format import ChatFormat
from tools.draft_head.recipe import DataRecipe, Recipe
from tools.draft_head.store import Conversation, Work
from tools.draft_head.turns import assistant, user
from tools.draft_head.writer import Writer

pytestmark = pytest.mark.models

SETTINGS = DataRecipe(
    tokens=1500,
    shard_conversations=24,
    in_flight=8,
    max_answer_tokens=24,
    max_prompt_tokens=256,
    temperatures=(0.0, 0.7, 1.0),
    kv_cache_mib=8,
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


def silent(_: str) -> None:
    pass


def test_there_is_what_was_asked_for(finished: Work) -> None:
    written = conversations(finished)
    assert len(finished.data_shards()) > 1
    assert sum(len(one.answer) for one in written) >= SETTINGS.tokens
    assert len({one.id for one in written}) == len(written)
    assert len({one.prompt for one in written}) == len(written)
    assert all(len(one.prompt) <= 256 and 1 <= len(one.answer) <= 24 for one in written)
    own = [one for one in written if one.id % data.PER_NUMBER == 0]
    temperatures = Counter(one.temperature for one in own)
    assert set(temperatures) == {0.0, 0.7, 1.0}
    assert max(temperatures.values()) < 1.5 * min(temperatures.values())
    assert {"chat", "seeded", "translate", "passage"} <= {one.kind for one in written}


def test_prompts_are_those_of_the_chat_template(finished: Work, tiny: Recipe) -> None:
    chats = ChatFormat.of(Path(tiny.model))
    for one in conversations(finished):
        text = chats.tokenizer.decode(one.prompt)
        assert text.startswith("<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert 0 not in one.answer[:-1], "an answer goes on behind its end"


def test_answers_are_the_models_own(finished: Work, tiny: Recipe) -> None:
    """Greedy ones, against an engine that takes one request at a time."""
    models = load(tiny)
    greedy = [one for one in conversations(finished) if one.temperature == 0.0][:12]
    requests = [
        Request(str(one.id), one.prompt, 24, SamplingParams(), stop_token_ids=models.target.spec.eos_token_ids)
        for one in greedy
    ]
    config = Config().override(**{"engine.kv_cache_mib": 8, "engine.max_model_len": 512})
    outputs = Pipeline(models, parse_tree("none"), config.engine).run(requests)
    assert {one.id: list(one.answer) for one in greedy} == {int(name): out.token_ids for name, out in outputs.items()}


def load(tiny: Recipe) -> Models:
    settings = {"model.model": tiny.model, "model.provider": "reference", "model.dtype": "float32"}
    settings |= {"model.draft": "none", "model.tree": "none", "model.device": "cpu"}
    return assemble(Config().override(**settings))[0]


def test_a_run_that_was_stopped_goes_on_with_the_same_text(finished: Work, tiny: Recipe, tmp_path: Path) -> None:
    work = Work(tmp_path)
    data.run(work, dataclasses.replace(tiny, data=dataclasses.replace(SETTINGS, tokens=1)), silent)
    assert len(work.data_shards()) == 1
    data.run(work, tiny, silent)
    assert [p.read_bytes() for p in work.data_shards()] == [p.read_bytes() for p in finished.data_shards()]


def test_a_finished_run_loads_no_model(finished: Work, tiny: Recipe) -> None:
    data.run(finished, dataclasses.replace(tiny, model="/nowhere"), silent)


def test_another_seed_says_something_else(finished: Work, tiny: Recipe, tmp_path: Path) -> None:
    other = dataclasses.replace(tiny, seed=2, data=dataclasses.replace(SETTINGS, tokens=1))
    data.run(Work(tmp_path), other, silent)
    ours, theirs = conversations(finished), conversations(Work(tmp_path))
    assert not {one.prompt for one in ours} & {one.prompt for one in theirs if len(one.prompt) > 60}


def test_a_gap_among_the_shards_is_refused(finished: Work, tiny: Recipe, tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.write_conversations(work.data_shard(1), conversations(finished)[:1])
    with pytest.raises(ConfigError, match="a shard is missing"):
        data.run(work, tiny, silent)


def test_prompts_that_never_fit_end_the_run(tiny: Recipe, tmp_path: Path) -> None:
    small = dataclasses.replace(SETTINGS, max_prompt_tokens=16, shard_conversations=4)
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens: nothing fits 16"):
        data.run(Work(tmp_path), dataclasses.replace(tiny, data=small), silent)


@pytest.mark.parametrize("memory_mib", [1, 64])
def test_the_writer_writes_what_one_request_alone_gets(
    tiny: Recipe, memory_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many lengths at once, some with the shared beginning; in little memory some are preempted."""
    preempted: list[Allocation] = []
    step = DecodeRunner.step

    def watched(runner: DecodeRunner) -> Step:
        done = step(runner)
        preempted.extend(done.preempted)
        return done

    monkeypatch.setattr(DecodeRunner, "step", watched)
    models, draw = load(tiny), random.Random(0)
    shared = tuple(draw.randrange(3, 300) for _ in range(40))
    requests = []
    for number in range(24):
        prompt = tuple(draw.randrange(3, 300) for _ in range(draw.choice((1, 5, 60))))
        prompt = shared + prompt if number % 3 else prompt
        sampling = SamplingParams(draw.choice((0.0, 1.0)), draw.choice((0.9, 1.0)), seed=number)
        stops = models.target.spec.eos_token_ids
        requests.append(Request(str(number), prompt, draw.choice((1, 80, 80)), sampling, stop_token_ids=stops))
    config = Config().override(
        **{"engine.kv_cache_mib": memory_mib, "engine.max_batch": 17, "engine.max_model_len": 192}
    )
    writer = Writer(models, config.engine, cut=lambda _: False)
    writer.share(shared)
    for request in requests:
        writer.submit(request)
    found: dict[str, tuple[int, ...]] = {}
    while len(found) < len(requests):
        found |= {written.request_id: written.token_ids for written in writer.step()}
    assert writer.tokens == sum(map(len, found.values()))
    assert bool(preempted) == (memory_mib == 1)
    expected = Pipeline(models, parse_tree("none"), Config().engine).run(requests)
    assert found == {name: tuple(output.token_ids) for name, output in expected.items()}


def test_loops_are_seen_when_they_have_lasted() -> None:
    draw = random.Random(0)
    start = [draw.randrange(1000) for _ in range(32)]
    assert data.loops([*start, *[7] * 64])
    assert data.loops([*start, *list(range(16)) * 4])
    assert not data.loops([*start, *[7] * 48])
    assert not data.loops([draw.randrange(1000) for _ in range(96)])
    assert not data.loops([*start, *list(range(17)) * 4][:96])


def test_the_shares_are_kept() -> None:
    shares = dict.fromkeys(("summarize", "passage_qa", "multi", "question", "math", "seeded"), 0.0)
    settings = DataRecipe(shares=recipe.Shares(**shares, chat=3, translate=1))
    studio = data.Studio(Recipe(data=settings), None, None, set())  # type: ignore[arg-type]
    kinds = Counter(studio.kind(number) for number in range(2000))
    assert set(kinds) == {"chat", "translate"}
    assert 1400 < kinds["chat"] < 1600


@pytest.mark.parametrize("begun", ["", "Write a"])
def test_the_models_turn_begins_where_the_users_would(begun: str) -> None:
    chats = ChatFormat.of(locate_model("default"))
    before = (user("Hello"), assistant("Hi"))
    text = chats.tokenizer.decode(chats.turn_prompt(before, begun))
    assert text.endswith(
        f"<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\n{begun}"
    )
    assert chats.tokenizer.convert_ids_to_tokens(list(chats.turn_ends)) == ["<|im_end|>"]


def test_a_model_without_a_template_is_refused(tiny: Recipe, tmp_path: Path) -> None:
    tokenizer = ChatFormat.of(Path(tiny.model)).tokenizer
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        ChatFormat.of(tmp_path)
