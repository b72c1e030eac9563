"""What the scripts ask the model for, and what they make of its answers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest

from tools.draft_head import wording
from tools.draft_head.recipe import Shares
from tools.draft_head.turns import KINDS, Chat, RefusedError, Reply, Turn, passage_qa, question, summarize, translate

Answer = Callable[[Turn | Reply], str]


def played(kind: str, seed: int, model: Answer, room: int = 300) -> tuple[list[Turn | Reply], Chat]:
    """The script with a model that says what it is told to: what was asked, and the chat that came of it."""
    script = KINDS[kind](random.Random(seed), room)
    asked: list[Turn | Reply] = []
    text: str | None = None
    while True:
        try:
            asked.append(script.send(text) if text is not None else next(script))
        except StopIteration as end:
            return asked, end.value
        text = model(asked[-1])


def ordinary(asked: Turn | Reply) -> str:
    if isinstance(asked, Turn):
        return f"{asked.begun} rivers of Wales? Tell me more.\nNow."
    return "Wales has rivers. The Severn is the longest one. It ri"


def test_the_recipe_knows_all_kinds() -> None:
    assert {entry.name for entry in dataclasses.fields(Shares)} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_ends_with_a_turn_of_the_user(kind: str) -> None:
    for seed in range(20):
        _, chat = played(kind, seed, ordinary)
        assert chat[-1]["role"] == "user"
        assert chat[-1]["content"].strip()
        assert [turn["role"] for turn in chat] == (["user", "assistant", "user"] if len(chat) == 3 else ["user"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_script_decides_by_its_random_numbers_alone(kind: str) -> None:
    assert played(kind, 5, ordinary) == played(kind, 5, ordinary)
    if kind != "chat":  # it leaves everything to the model
        assert any(played(kind, 5, ordinary) != played(kind, seed, ordinary) for seed in range(6, 9))


def test_a_question_ends_with_its_mark() -> None:
    _, chat = played(question.__name__, 1, ordinary)
    assert chat[0]["content"].endswith("rivers of Wales?")


def test_a_question_of_a_word_is_refused() -> None:
    with pytest.raises(RefusedError):
        played(question.__name__, 1, lambda _: "Who?")


def test_a_word_problem_comes_without_its_solution() -> None:
    _, chat = played("math", 1, lambda _: "Tom has two apples.\nHow many are left?\n\nTo solve this, count.")
    assert chat[0]["content"] == "Tom has two apples.\nHow many are left?"


def test_half_of_the_translations_are_from_german_and_one_line() -> None:
    chats = [played(translate.__name__, seed, ordinary)[1] for seed in range(300)]
    texts = [chat[0]["content"] for chat in chats]
    assert not any("\n" in text for text in texts)
    german = sum("German" in text for text in texts)
    assert 90 < german < 190  # about half; a sixth of the instructions name no language


def test_a_passage_has_whole_sentences_and_fits_its_room() -> None:
    parts = set()
    for seed in range(30):
        asked, chat = played(summarize.__name__, seed, ordinary)
        passages = [one for one in asked if isinstance(one, Reply)]
        parts.add(len(passages))
        assert sum(one.tokens for one in passages) <= 300
        assert all(one.keep == "passage" for one in passages)
        assert chat[0]["content"].count("The Severn is the longest one.") == len(passages)
        assert "It ri" not in chat[0]["content"].replace("rivers", "")
    assert parts == {1, 2}


def test_a_question_about_a_passage_follows_it() -> None:
    for seed in range(30):
        asked, chat = played(passage_qa.__name__, seed, ordinary)
        turn = asked[-1]
        assert isinstance(turn, Turn)
        assert chat[0]["content"] == f"{turn.begun} rivers of Wales?"
        assert "The Severn is the longest one." in turn.begun


def test_the_wording_has_no_gaps() -> None:
    lists = (wording.SEEDS, wording.QUESTION_SEEDS, wording.MATH_SEEDS, *wording.STARTS.values())
    for entries in lists:
        assert all(entries)
        assert len(set(entries)) == len(entries)
        assert not any("|" in entry or entry != entry.strip() for entry in entries)
