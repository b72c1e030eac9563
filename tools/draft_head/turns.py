"""What the conversations are about: a plan for each kind, made of parts that are given and parts that the model writes.

A plan is settled before anything is written and follows from its random numbers alone, so that a conversation can be
written again. All instructions here are our own words; everything else, topics and passages included, the model
writes where it stands: a passage is part of the very turn that asks about it, so nothing is read twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from tools.draft_head import wording


class Speaker(Enum):
    USER = "user"
    ASSISTANT = "assistant"


class Until(Enum):
    """Where a part ends, but for the turn's end and its limit, which every part has."""

    TURN = "the turn's end"
    LINE = "before a line break"
    QUESTION = "behind a question mark"


@dataclass(frozen=True)
class Part:
    """`given`, then up to `tokens` tokens of the model's. Parts of one speaker in a row are one turn."""

    speaker: Speaker
    given: str = ""
    tokens: int = 0
    until: Until = Until.TURN
    #: Written for its variety: names, figures and facts of any kind, as in other people's texts.
    passage: bool = False


Plan = tuple[Part, ...]

#: Tokens of the last answer of a plan; the recipe's limit takes their place.
_ANSWER = Part(Speaker.ASSISTANT, tokens=1)


def _user(given: str, tokens: int = 96, until: Until = Until.TURN, *, passage: bool = False) -> Part:
    return Part(Speaker.USER, given, tokens, until, passage)


def chat(_: random.Random, __: int) -> Plan:
    """A turn sampled freely from the chat template (Xu et al. 2024, Magpie, arXiv 2406.08464)."""
    return (_user(""), _ANSWER)


def seeded(draw: random.Random, _: int) -> Plan:
    """A turn that goes on from a few words."""
    return (_user(draw.choice(wording.SEEDS)), _ANSWER)


def question(draw: random.Random, _: int) -> Plan:
    """One short question."""
    return (_user(draw.choice(wording.QUESTION_SEEDS), 40, Until.QUESTION), _ANSWER)


def math(draw: random.Random, _: int) -> Plan:
    """A word problem, without the solution that a small model likes to add."""
    return (_user(draw.choice(wording.MATH_SEEDS), 112, Until.LINE), _ANSWER)


def translate(draw: random.Random, _: int) -> Plan:
    """A sentence that the model writes in another language, because its turn begins in it."""
    language = draw.choice((*wording.STARTS, *["German"] * len(wording.STARTS)))
    begun = draw.choice(wording.TRANSLATE).format(language=language) + draw.choice(wording.STARTS[language])
    return (_user(begun, 72, Until.LINE), _ANSWER)


def summarize(draw: random.Random, room: int) -> Plan:
    before, behind = draw.choice(wording.SUMMARIZE)
    more = _follow_ups(draw, room)
    passage = _passage(draw, _length(draw, room - _room(more)), before)
    return (passage, *((_user(behind, 0),) if behind else ()), *more, _ANSWER)


def passage_qa(draw: random.Random, room: int) -> Plan:
    """A passage or a few, and a question that the model asks because its turn goes on so."""
    before, between = draw.choice(wording.PASSAGE_QA)
    count = draw.choice((1, 2, 3))
    more = _follow_ups(draw, room)
    length = _length(draw, room - _room(more)) // count
    passages = [_passage(draw, length, "\n" if number else before) for number in range(count)]
    return (*passages, _question(draw, between), *more, _ANSWER)


def multi(draw: random.Random, room: int) -> Plan:
    """A second turn after an answer."""
    first = _user(draw.choice(("", *wording.SEEDS)))
    answer = Part(Speaker.ASSISTANT, tokens=max(room // 3, 1))
    return (first, answer, _user(draw.choice(wording.SECOND_SEEDS), 64), _ANSWER)


KINDS: dict[str, Callable[[random.Random, int], Plan]] = {
    "summarize": summarize,
    "passage_qa": passage_qa,
    "multi": multi,
    "seeded": seeded,
    "chat": chat,
    "math": math,
    "translate": translate,
    "question": question,
}  # the longest first: neighbours are written together, and those that take longest start first


def _passage(draw: random.Random, room: int, before: str) -> Part:
    return _user(before + draw.choice(wording.PASSAGE_SEEDS), max(room, 1), passage=True)


def _question(draw: random.Random, before: str = "") -> Part:
    """About the passages of a chat."""
    return _user(before + draw.choice(wording.PASSAGE_QUESTION_SEEDS), 32, Until.QUESTION)


def _follow_ups(draw: random.Random, room: int) -> Plan:
    """An answer and another question, up to twice, in at most half of the room: answers cost less than passages."""
    pairs = [(Part(Speaker.ASSISTANT, tokens=128), _question(draw)) for _ in range(draw.choice((0, 1, 2)))]
    while pairs and len(pairs) * _room(pairs[0]) > room // 2:
        pairs.pop()
    return tuple(part for pair in pairs for part in pair)


def _room(parts: Sequence[Part]) -> int:
    """Tokens that they can take, roughly: the template's and the instructions' are counted as eight for each."""
    return sum(part.tokens + 8 for part in parts)


def _length(draw: random.Random, room: int) -> int:
    return int(room * draw.choice((0.25, 0.4, 0.6, 1.0)))
