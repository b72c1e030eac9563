"""Many conversations at once, for throughput: each goes on from the cache that it has, token by token, whether its
next token is given or drawn; so what a plan gives needs no pass of its own, and nothing is ever read twice.

What the draft head will learn from is there when a token has been read: the states are kept beside the text.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from branchline.engine.models.protocol import Models
from tools.draft_head.cohort import Box, BoxAttention
from tools.draft_head.segments import Segment

#: A text that has said the same for so many tokens, and so often, is cut: the head has seen it by then.
LOOP_TOKENS, LOOP_TIMES, _LOOP_EVERY = 64, 4, 16
#: Cohorts that the sequences in flight are divided into, when all are full.
_COHORTS = 4
_STEPS, _BLOCK = 2**20, 64


@dataclass(frozen=True)
class Order:
    """A conversation to be written. What is drawn follows from `seed` and the model's logits alone."""

    name: str
    segments: tuple[Segment, ...]
    seed: str

    @property
    def longest(self) -> int:
        return sum(len(segment.given) + segment.limit for segment in self.segments)


@dataclass(frozen=True)
class Written:
    """tokens: all of the conversation; `begun` is the offset of the first that the model wrote, `answer` that of the
    last answer's first. states `[tokens - 1, n]`: what was kept of each token that was read. choices int32 `[tokens]`:
    the model's first choice for the token after each one from `begun` on, -1 elsewhere and at the end."""

    name: str
    tokens: tuple[int, ...]
    begun: int
    answer: int
    states: torch.Tensor
    choices: torch.Tensor


@dataclass
class _Sequence:
    order: Order
    draw: random.Random
    #: Every token that was read or is about to be.
    tokens: list[int]
    #: Given tokens that are still to be read.
    given: deque[int]
    choices: list[int] = field(default_factory=list)
    #: The segment that is being written; the offset of its first token, 0 before there is one; that of the very first.
    segment: int = 0
    start: int = 0
    begun: int = 0
    dropped: bool = False

    @property
    def current(self) -> Segment:
        return self.order.segments[self.segment]

    @property
    def is_last(self) -> bool:
        return self.segment == len(self.order.segments) - 1


class Writer:
    """Not thread-safe. `fresh` is asked before each answer whether what leads to it is worth one."""

    def __init__(
        self, models: Models, opening: Sequence[int], in_flight: int, fresh: Callable[[tuple[int, ...]], bool]
    ) -> None:
        self._models, self._fresh = models, fresh
        self._in_flight, self._cohort = in_flight, max(1, in_flight // _COHORTS)
        self._waiting: deque[Order] = deque()
        self._running: list[tuple[Box, list[_Sequence]]] = []
        self._opening = self._read_opening(opening)
        #: Conversations that came to nothing: looped before the answer, empty, or not fresh.
        self.dropped = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, order: Order) -> None:
        self._waiting.append(order)

    @torch.inference_mode()
    def step(self) -> list[Written]:
        """Starts what there is room for, and takes every sequence a token further; returns those that ended."""
        self._start()
        boxes = [box for box, _ in self._running]
        for box in boxes:
            box.make_room()
        sequences = [sequence for _, members in self._running for sequence in members]
        choices, drawn = self._next(boxes, sequences)
        outcomes = iter(zip(choices, drawn, strict=True))
        ended: list[Written] = []
        for box, members in self._running:
            box.rows += 1
            over = [place for place, sequence in enumerate(members) if not self._advance(sequence, *next(outcomes))]
            ended += [_written(members[place], box, place) for place in over if not members[place].dropped]
            for place in reversed(over):
                box.remove(place)
                members[place] = members[-1]
                members.pop()
        self._running = [(box, members) for box, members in self._running if members]
        return ended

    def _start(self) -> None:
        active = sum(len(members) for _, members in self._running)
        while self._waiting and active + min(self._cohort, len(self._waiting)) <= self._in_flight:
            orders = [self._waiting.popleft() for _ in range(min(self._cohort, len(self._waiting)))]
            box = self._opening.like(len(orders))
            self._running.append((box, [_begun(order, box.rows) for order in orders]))
            active += len(orders)

    def _next(self, boxes: list[Box], sequences: list[_Sequence]) -> tuple[list[int], list[int]]:
        """Reads each sequence's last token: the model's first choices, and what is drawn by those that draw."""
        device = self._models.device
        tokens = torch.tensor([sequence.tokens[-1] for sequence in sequences], device=device)
        rows = [box.rows for box in boxes for _ in range(box.size)]
        positions = torch.tensor(rows, device=device)
        output = self._models.target.forward(tokens, positions, BoxAttention(boxes))
        assert output.auxiliary is not None
        kept = torch.cat([output.auxiliary, output.hidden], 1)
        for box, part in zip(boxes, torch.split(kept, [box.size for box in boxes]), strict=True):
            box.states[: box.size, box.rows] = part
        logits = self._models.target.logits(output.hidden)[:, : self._models.target.spec.vocab_size]
        first = logits.argmax(-1).tolist()
        drawn = list(first)
        drawing = [
            index
            for index, sequence in enumerate(sequences)
            if not sequence.given and sequence.current.voice.temperature > 0
        ]
        if drawing:
            segments = [sequences[index].current for index in drawing]
            chances = [sequences[index].draw.random() for index in drawing]
            for index, token in zip(drawing, draw(logits[drawing], segments, chances), strict=True):
                drawn[index] = token
        return first, drawn

    def _advance(self, sequence: _Sequence, choice: int, drawn: int) -> bool:
        """Settles the token that is read next; False if there is none."""
        sequence.choices.append(choice)
        if sequence.given:
            sequence.tokens.append(sequence.given.popleft())
            return True
        if not sequence.start:
            sequence.start = len(sequence.tokens)
            sequence.begun = sequence.begun or sequence.start
        segment = sequence.current
        ends = drawn in segment.before
        if not ends or sequence.is_last:
            sequence.tokens.append(drawn)
        said = sequence.tokens[sequence.start :]
        looped = loops(said)
        over = ends or drawn in segment.through or len(said) >= segment.limit
        if sequence.is_last or (looped and segment.answer):  # nobody goes on from an answer that loops
            return not (over or looped)
        if looped or (over and not said):
            return self._drop(sequence)
        return self._go_on(sequence, ends) if over else True

    def _go_on(self, sequence: _Sequence, ended: bool) -> bool:
        """To the next segment."""
        sequence.segment, sequence.start = sequence.segment + 1, 0
        sequence.given.extend(sequence.current.given)
        if sequence.current.answer and not self._fresh((*sequence.tokens, *sequence.given)):
            return self._drop(sequence)
        if ended:  # the token that ended the segment isn't part of it, so there is none to be read yet
            sequence.tokens.append(sequence.given.popleft())
        return True

    def _drop(self, sequence: _Sequence) -> bool:
        self.dropped += 1
        sequence.dropped = True
        return False

    def _read_opening(self, tokens: Sequence[int]) -> Box:
        """What all begin with, but for its last token: that one they read themselves, to draw the one after it."""
        spec = self._models.target.spec
        box = Box.empty(1, spec.kv, 4 * spec.hidden_size, self._models.device)
        with torch.inference_mode():
            for token in tokens[:-1]:
                box.make_room()
                sequence = _Sequence(Order("", (), ""), random.Random(), [token], deque([0]))
                self._next([box], [sequence])
                box.rows += 1
        return box


def _begun(order: Order, read: int) -> _Sequence:
    """Of an order whose first `read` tokens are in the cache."""
    given = order.segments[0].given
    return _Sequence(
        order, random.Random(order.seed), list(given[: read + 1]), deque(given[read + 1 :]), choices=[-1] * read
    )


def _written(sequence: _Sequence, box: Box, place: int) -> Written:
    tokens = tuple(sequence.tokens)
    states = box.states[place, : len(tokens) - 1].to("cpu", copy=True)
    choices = torch.tensor([*sequence.choices, -1], dtype=torch.int32)
    choices[: sequence.begun] = -1
    assert len(choices) == len(tokens), (len(choices), len(tokens))
    return Written(sequence.order.name, tokens, sequence.begun, sequence.start, states, choices)


def draw(logits: torch.Tensor, segments: Sequence[Segment], chances: Sequence[float]) -> list[int]:
    """A token for each row of `[rows, vocab]`, as its segment wants it: the one at which the cumulated probabilities
    pass the row's chance in [0, 1). Where many rows are drawn at once this is a fraction of what the engine's noise
    costs, which needs a hash for every token of the vocabulary."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    scores = logits.float() / column([segment.voice.temperature for segment in segments])
    for row, segment in enumerate(segments):
        if segment.banned:
            scores[row, list(segment.banned)] = -torch.inf
    # Relative to the likeliest, and in two steps, blocks first: fewer passes over what is as wide as the vocabulary.
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    weights.mul_(weights >= column([segment.voice.min_p for segment in segments]))
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _BLOCK)).view(len(weights), -1, _BLOCK)
    by_block = blocks.sum(-1)
    # In steps that float32 can tell from 1: else a token could be found that has no weight.
    wanted = column([int(chance * _STEPS) / _STEPS for chance in chances]) * by_block.sum(-1, keepdim=True)
    block, rest = _where(by_block, wanted)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block]
    token, _ = _where(inside, rest)
    found: list[int] = (block * _BLOCK + token).tolist()
    return found


def _where(weights: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By row, the entry at which the cumulated weights pass `wanted`, the last with a weight if none does; and what is
    wanted of that entry."""
    reached = weights.cumsum(-1)
    last = (weights.shape[1] - 1) - (weights > 0).flip(-1).int().argmax(-1)
    found = torch.minimum(torch.searchsorted(reached, wanted, right=True)[:, 0], last)
    at = found[:, None]
    return found, wanted - (reached.gather(1, at) - weights.gather(1, at))


def loops(token_ids: Sequence[int]) -> bool:
    """Whether the end repeats itself, LOOP_TIMES at least and for LOOP_TOKENS; now and then, for it takes time."""
    if len(token_ids) < LOOP_TOKENS or len(token_ids) % _LOOP_EVERY:
        return False
    end = list(token_ids[-LOOP_TOKENS:])
    return any(end[period:] == end[:-period] for period in range(1, LOOP_TOKENS // LOOP_TIMES + 1))
