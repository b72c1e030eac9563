"""Traces of requests that share prefixes, made up from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

VOCABULARY = 32_000


@dataclass(frozen=True)
class Turn:
    """What the user adds to all that was said before, the tokens of the answer, and seconds of thought before it."""

    says: tuple[int, ...]
    answer_tokens: int
    think_s: float


@dataclass(frozen=True)
class Conversation:
    """`turns[0]` comes `at` seconds after the trace's beginning, behind the system prompt if there is one."""

    at: float
    name: str
    system: tuple[int, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Shape:
    """A trace's. Popularity of system prompts falls with their rank to the power of `skew`; `alone`: the share of
    conversations that have none, of one turn."""

    systems: int
    system_tokens: tuple[int, int]
    skew: float
    alone: float
    mean_turns: float


#: Conversations a second are given for each by the command line.
SHAPES = {
    "mixed": Shape(systems=24, system_tokens=(300, 2500), skew=1.1, alone=0.2, mean_turns=4.0),
    "one prompt": Shape(systems=1, system_tokens=(2000, 2000), skew=0.0, alone=0.0, mean_turns=1.0),
    "unrelated": Shape(systems=1, system_tokens=(1, 1), skew=0.0, alone=1.0, mean_turns=1.0),
}


def trace(shape: Shape, conversations_per_s: float, seconds: float, seed: int) -> list[Conversation]:
    """Conversations begin as a Poisson process."""
    draw = random.Random(seed)
    systems = [_tokens(draw, draw.randint(*shape.system_tokens)) for _ in range(shape.systems)]
    weights = list(itertools.accumulate((rank + 1) ** -shape.skew for rank in range(shape.systems)))
    conversations: list[Conversation] = []
    at = draw.expovariate(conversations_per_s)
    while at < seconds:
        alone = draw.random() < shape.alone
        turns = 1
        while not alone and draw.random() < 1 - 1 / shape.mean_turns:
            turns += 1
        conversations.append(
            Conversation(
                at=at,
                name=f"c{len(conversations)}",
                system=() if alone else _popular(draw, systems, weights),
                turns=tuple(_turn(draw, alone=alone) for _ in range(turns)),
            )
        )
        at += draw.expovariate(conversations_per_s)
    return conversations


def _popular(draw: random.Random, systems: list[tuple[int, ...]], weights: Sequence[float]) -> tuple[int, ...]:
    return draw.choices(systems, cum_weights=weights)[0]


def _turn(draw: random.Random, *, alone: bool) -> Turn:
    says = _tokens(draw, draw.randint(200, 3000) if alone else draw.randint(30, 250))
    return Turn(says, draw.randint(32, 256), draw.expovariate(1 / 8.0))


def _tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(VOCABULARY), k=count))
