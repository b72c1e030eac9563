"""What the user turns ask for: one script a kind of conversation.

A script is a generator that yields what the model is to write next and gets its text back; at its end it returns the
chat that is to be answered. It decides from its own random numbers alone, so that a conversation can be written again.
All instructions here are our own words; everything else, topics included, the model writes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass

from tools.draft_head import wording

Chat = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Turn:
    """The user's next turn after `chat`, begun with `begun`. The answer to it is the whole turn."""

    begun: str = ""
    chat: Chat = ()
    tokens: int = 96


@dataclass(frozen=True)
class Reply:
    """The assistant's reply to `chat`, whose last turn is the user's. It becomes a conversation of its own, of
    the kind `keep`."""

    chat: Chat
    tokens: int
    keep: str


Script = Generator[Turn | Reply, str, Chat]


class RefusedError(Exception):
    """What the model wrote is of no use for this script; another attempt may be."""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat(_: random.Random, __: int) -> Script:
    """A turn sampled freely from the chat template (Xu et al. 2024, Magpie, arXiv 2406.08464)."""
    return (user((yield Turn())),)


def seeded(draw: random.Random, _: int) -> Script:
    """A turn that goes on from a few words."""
    return (user((yield Turn(draw.choice(wording.SEEDS)))),)


def question(draw: random.Random, _: int) -> Script:
    """One short question."""
    text = yield Turn(draw.choice(wording.QUESTION_SEEDS), tokens=40)
    return (user(_through_question(text)),)


def math(draw: random.Random, _: int) -> Script:
    """A word problem, without the solution that a small model likes to add."""
    text = yield Turn(draw.choice(wording.MATH_SEEDS), tokens=128)
    return (user(text.split("\n\n")[0]),)


def translate(draw: random.Random, _: int) -> Script:
    """A sentence that the model writes in another language, because its turn begins in it."""
    language = draw.choice((*wording.STARTS, *["German"] * len(wording.STARTS)))
    begun = draw.choice(wording.TRANSLATE).format(language=language) + draw.choice(wording.STARTS[language])
    text = yield Turn(begun, tokens=64)
    return (user(text.split("\n")[0]),)


def summarize(draw: random.Random, room: int) -> Script:
    passage = yield from _passage(draw, room)
    return (user(draw.choice(wording.SUMMARIZE).format(passage=passage)),)


def passage_qa(draw: random.Random, room: int) -> Script:
    """A passage, and a question that the model asks because its turn begins with the passage."""
    passage = yield from _passage(draw, room)
    begun = draw.choice(wording.PASSAGE_QA).format(passage=passage)
    text = yield Turn(begun + draw.choice(wording.PASSAGE_QUESTION_SEEDS), tokens=40)
    return (user(begun + _through_question(text[len(begun) :])),)


def multi(draw: random.Random, room: int) -> Script:
    """A second turn after an answer."""
    first = (user((yield Turn(draw.choice(("", *wording.SEEDS))))),)
    answer = yield Reply(first, tokens=max(room // 2, 1), keep="chat")
    before = (*first, assistant(answer))
    return (*before, user((yield Turn(draw.choice(wording.SECOND_SEEDS), before, tokens=64))))


KINDS: dict[str, Callable[[random.Random, int], Script]] = {
    "summarize": summarize,
    "passage_qa": passage_qa,
    "multi": multi,
    "chat": chat,
    "seeded": seeded,
    "math": math,
    "translate": translate,
    "question": question,
}  # the longest first: they start first in a shard, so that its end is short


def _passage(draw: random.Random, room: int) -> Generator[Turn | Reply, str, str]:
    """One or two texts on a topic that the model names, `room` tokens together at most."""
    parts = draw.choice((1, 1, 2))
    room = int(room * draw.choice((0.4, 0.7, 1.0)))
    form = draw.choice(wording.FORMS)
    request = yield Turn(f"Write {form} about", tokens=32)
    request = request.split("\n")[0]
    texts = [_whole_sentences((yield Reply((user(request),), room // parts, keep="passage")))]
    if parts == 2:
        again = request.replace(form, draw.choice(wording.FORMS), 1)
        texts.append(_whole_sentences((yield Reply((user(again),), room // parts, keep="passage"))))
    return draw.choice(("\n", "\n\n")).join(texts)


def _through_question(text: str) -> str:
    """Up to the first question mark; the first line if there is none."""
    end = text.find("?")
    text = text[: end + 1] if end >= 0 else text.split("\n")[0]
    if len(text) < 8:
        raise RefusedError
    return text


def _whole_sentences(text: str) -> str:
    """Without the sentence that the limit cut off, if another one stays."""
    whole = re.match(r".*[.!?][\"'”)]*(?=\s|$)", text, re.DOTALL)
    return (whole.group() if whole else text).strip()
