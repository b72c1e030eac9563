"""Data: the model writes user turns, and answers them. Nothing else teaches the head; there is no outside data set.

A shard is the unit of work: it begins with an empty batch and draws from the recipe's seed and its own number alone, so
a run that was stopped writes the same shards when it is taken up again, and several processes can write side by side:
where cores are few, two that compute with one thread each get more done than one with two. What the head will read of
the model is kept while it writes, so a shard comes with its features (`features.py`).
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from branchline.config import ConfigError
from branchline.engine.models.locate import locate_model
from tools.draft_head import features
from tools.draft_head.chat_format import ChatFormat
from tools.draft_head.progress import Progress
from tools.draft_head.recipe import Recipe
from tools.draft_head.segments import Segmenter, Voice
from tools.draft_head.store import Conversation, Work
from tools.draft_head.turns import KINDS
from tools.draft_head.writer import Order, Writer, Written

Say = Callable[[str], None]

#: Tokens of a prompt that are kept free beside a passage: for the template, the instruction and a question.
_AROUND = 80
#: Seconds for a process to end that was told to.
_END_S = 10.0


def run(work: Work, recipe: Recipe, say: Say) -> None:
    """Writes shards until there are as many written tokens as the recipe wants. Raises ConfigError and ModelError."""
    tokens = _tokens(work)
    if tokens >= recipe.data.tokens:
        say(f"{tokens:,} written tokens are there")
        return
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_write_shards, args=(work, recipe, number), daemon=True)
        for number in range(1, recipe.data.processes)
    ]
    for other in others:
        other.start()
    try:
        _write_shards(work, recipe, 0, say)
        for other in others:
            other.join()
    finally:
        for other in others:
            other.terminate()
            other.join(_END_S)
    failed = [other.exitcode for other in others if other.exitcode]
    if failed:
        raise ConfigError(f"data.processes: {len(failed)} of them failed, with exit code {failed[0]}; see above")


def _tokens(work: Work) -> int:
    return sum(one.learned for path in work.data_shards() for one in work.open_conversations(path))


def _write_shards(work: Work, recipe: Recipe, number: int, say: Say | None = None) -> None:
    """The shards that are missing of every so many, beginning with `number`, as long as tokens are."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to all; the parent ends this process
    threads = recipe.threads
    if recipe.data.processes > 1:
        threads = max(1, (threads or len(os.sched_getaffinity(0))) // recipe.data.processes)
    studio = Studio.open(replace(recipe, threads=threads), say or _silent)
    with Progress(recipe.data.tokens, "tokens", say or _silent, done=_tokens(work)) as progress:
        for index in itertools.count(number, recipe.data.processes):
            if work.data_shard(index).exists():
                continue
            if _tokens(work) >= recipe.data.tokens:
                return
            shard: dict[int, tuple[Conversation, Written]] = {}
            for conversation, written in studio.shard(index):
                if parent is not None and not parent.is_alive():
                    return
                shard[conversation.id] = conversation, written
                note = f"{studio.writer.dropped:,} conversations came to nothing"
                progress.add(conversation.learned * recipe.data.processes, note)
            if not shard:
                raise ConfigError(f"data.max_prompt_tokens: nothing fits {recipe.data.max_prompt_tokens} tokens")
            conversations, texts = zip(*(shard[number] for number in sorted(shard)), strict=True)
            path = work.data_shard(index)
            features.write(work, path, features.of_written(conversations, texts))
            work.write_conversations(path, conversations)


def _silent(_: str) -> None:
    """Of several processes one reports for all."""


@dataclass
class Studio:
    """Writes shards with one loaded model. Of two equal prompts in a shard, `known` refuses the second."""

    recipe: Recipe
    segmenter: Segmenter
    known: set[tuple[int, ...]] = field(default_factory=set)
    writer: Writer = field(init=False)

    @classmethod
    def open(cls, recipe: Recipe, say: Say) -> Studio:
        """Loads the model. Raises ConfigError and ModelError."""
        chats = ChatFormat.of(locate_model(recipe.model, say))
        models = features.load_for_features(recipe, say, compiled=recipe.data.compile)
        studio = cls(recipe, Segmenter(chats, frozenset(models.target.spec.eos_token_ids)))
        studio.writer = Writer(models, chats.opening, recipe.data.in_flight, studio._fresh)
        return studio

    def shard(self, index: int) -> Iterator[tuple[Conversation, Written]]:
        """The conversations of a shard, in the order in which they end."""
        self.known.clear()
        count = self.recipe.data.shard_conversations
        orders = {str(number): self._order(number) for number in range(index * count, (index + 1) * count)}
        # Those of like length side by side, for they begin together, and the longest first: so the end is short.
        for order in sorted(orders.values(), key=lambda order: (-order.longest, order.name)):
            if order.longest <= self._most:
                self.writer.submit(order)
        while self.writer.busy:
            for written in self.writer.step():
                yield self._conversation(written), written

    @property
    def _most(self) -> int:
        return self.recipe.data.max_prompt_tokens + self.recipe.data.max_answer_tokens

    def _order(self, number: int) -> Order:
        data = self.recipe.data
        draw = random.Random(f"{self.recipe.seed} plan {number}")
        plan = KINDS[self.kind(number)](draw, max(data.max_prompt_tokens - _AROUND, data.max_prompt_tokens // 4))
        segments = self.segmenter.compile(plan, Voice(self._temperature(number)), data.max_answer_tokens)
        return Order(str(number), segments, f"{self.recipe.seed} text {number}")

    def kind(self, number: int) -> str:
        shares = self.recipe.data.shares
        draw = random.Random(f"{self.recipe.seed} kind {number}")
        return draw.choices(list(KINDS), [getattr(shares, kind) for kind in KINDS])[0]

    def _temperature(self, number: int) -> float:
        return self.recipe.data.temperatures[number % len(self.recipe.data.temperatures)]

    def _conversation(self, written: Written) -> Conversation:
        number, tokens, answer = int(written.name), written.tokens, written.answer
        return Conversation(
            number, self.kind(number), self._temperature(number), tokens[:answer], tokens[answer:], written.begun
        )

    def _fresh(self, prompt: tuple[int, ...]) -> bool:
        if prompt in self.known:
            return False
        self.known.add(prompt)
        return True
