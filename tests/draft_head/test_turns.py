"""The plans, and what a model's tokenizer and template make of them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
from tiny_chat import save_chat_model

from branchline.engine.models.protocol import ModelError
from tools.draft_head import wording
from tools.draft_head.chat_format import ChatFormat
from tools.draft_head.recipe import Shares
from tools.draft_head.segments import PASSAGE, TURN, Segmenter, Voice
from tools.draft_head.turns import KINDS, Plan, Speaker, Until

pytestmark = pytest.mark.models

ROOM = 300


def planned(kind: str, seed: int) -> Plan:
    return KINDS[kind](random.Random(seed), ROOM)


def given(plan: Plan) -> str:
    return "…".join(part.given for part in plan)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return ChatFormat.of(save_chat_model(tmp_path_factory.mktemp("model")))


def test_the_recipe_knows_all_kinds() -> None:
    assert {entry.name for entry in dataclasses.fields(Shares)} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_ends_with_an_answer_to_a_user(kind: str) -> None:
    for seed in range(20):
        plan = planned(kind, seed)
        assert plan[0].speaker is Speaker.USER
        assert [part.speaker for part in plan[-2:]] == [Speaker.USER, Speaker.ASSISTANT]
        assert plan[-1].tokens
        assert any(part.tokens for part in plan if part.speaker is Speaker.USER)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_follows_from_its_random_numbers_alone(kind: str) -> None:
    assert planned(kind, 5) == planned(kind, 5)
    if kind != "chat":  # it leaves everything to the model
        assert any(planned(kind, 5) != planned(kind, seed) for seed in range(6, 9))


def test_half_of_the_translations_are_from_german() -> None:
    plans = [planned("translate", seed) for seed in range(300)]
    assert all(plan[0].until is Until.LINE for plan in plans)
    german = sum("German" in given(plan) for plan in plans)
    assert 90 < german < 190  # about half; a sixth of the instructions name no language


@pytest.mark.parametrize("kind", ["summarize", "passage_qa"])
def test_passages_fit_their_room(kind: str) -> None:
    rooms, counts = set(), set()
    for seed in range(40):
        passages = [part for part in planned(kind, seed) if part.passage]
        counts.add(len(passages))
        rooms.add(sum(part.tokens for part in passages))
        assert all(part.speaker is Speaker.USER for part in passages)
    assert 0 < min(rooms) < ROOM / 2 < max(rooms) <= ROOM
    assert counts == ({1} if kind == "summarize" else {1, 2, 3})


def test_a_question_about_passages_follows_them() -> None:
    for seed in range(30):
        plan = planned("passage_qa", seed)
        assert [part.passage for part in plan[-3:]] == [True, False, False]
        assert plan[-2].until is Until.QUESTION


@pytest.mark.parametrize("kind", ["summarize", "passage_qa"])
def test_where_there_is_room_more_is_asked_about_passages(kind: str) -> None:
    room, asked = 1000, set()
    for seed in range(60):
        plan = KINDS[kind](random.Random(seed), room)
        assert (
            sum(part.tokens for part in plan) <= room + 32 + 1
        )  # a first question, and what the recipe's limit is for
        answers = [place for place, part in enumerate(plan) if part.speaker is Speaker.ASSISTANT]
        assert all(not part.passage for part in plan[answers[0] :])
        assert all(plan[place - 1].until is Until.QUESTION for place in answers[1:])
        asked.add(len(answers))
    assert asked == {1, 2, 3}


def test_the_wording_has_no_gaps() -> None:
    lists = (wording.SEEDS, wording.QUESTION_SEEDS, wording.MATH_SEEDS, wording.PASSAGE_SEEDS, *wording.STARTS.values())
    for entries in lists:
        assert all(entries)
        assert len(set(entries)) == len(entries)
        assert not any("|" in entry or entry != entry.strip() for entry in entries)


def test_the_template_is_taken_apart(chats: ChatFormat) -> None:
    decoded = [chats.tokenizer.decode(piece) for piece in (chats.opening, chats.to_answer, chats.to_turn)]
    assert decoded == [
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_segments_give_what_the_template_would(chats: ChatFormat, kind: str) -> None:
    """Between what the model writes, here one word each time, stands what `apply_chat_template` writes."""
    segmenter = Segmenter(chats, frozenset({0}))
    for seed in range(10):
        plan = planned(kind, seed)
        segments = segmenter.compile(plan, Voice(0.0), 24)
        said = "".join(chats.tokenizer.decode(segment.given) + "word" for segment in segments)
        turns: list[dict[str, str]] = []
        for part in plan:
            text = part.given + ("word" if part.tokens else "")
            if turns and turns[-1]["role"] == part.speaker.value:
                turns[-1]["content"] += text
            else:
                turns.append({"role": part.speaker.value, "content": text})
        expected = chats.tokenizer.apply_chat_template(turns, tokenize=False)
        assert f"{said}<|im_end|>\n" == expected
        assert segments[-1].limit == 24
        assert segments[-1].answer


def test_parts_end_where_they_should(chats: ChatFormat) -> None:
    segmenter = Segmenter(chats, frozenset({0}))
    question, line, mark = (chats.tokens(text)[0] for text in ("?", "\n", "."))
    asked = segmenter.compile(planned("question", 1), Voice(0.7), 24)[0]
    assert question in asked.through
    assert mark not in asked.through | asked.before
    assert 0 in asked.before
    assert asked.voice == TURN
    problem = segmenter.compile(planned("math", 1), Voice(0.7), 24)[0]
    assert line in problem.before
    assert not problem.through
    passage = segmenter.compile(planned("summarize", 1), Voice(0.7), 24)[0]
    assert not passage.before | passage.through
    assert passage.banned == {0}
    assert passage.voice == PASSAGE


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer = ChatFormat.of(save_chat_model(tmp_path / "with")).tokenizer
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "without")
    with pytest.raises(ModelError, match="no chat template"):
        ChatFormat.of(tmp_path / "without")


def test_a_template_that_leaves_words_out_is_refused(tmp_path: Path) -> None:
    tokenizer = ChatFormat.of(save_chat_model(tmp_path)).tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="doesn't show what is said"):
        ChatFormat.of(tmp_path)
