"""Data: the model writes user turns, and answers them. Nothing else teaches the head; there is no outside data set.

A shard is the unit of work: it begins with an empty batch and draws from the recipe's seed alone, so a run that was
stopped writes the same shards when it is taken up again. Within it the batch is kept full, whatever the conversations
need.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from branchline.config import Config, ConfigError
from branchline.core import Request, SamplingParams
from branchline.engine.assemble import assemble
from branchline.engine.models.locate import locate_model
from tools.draft_head.chat_format import ChatFormat
from tools.draft_head.progress import Progress
from tools.draft_head.recipe import Recipe
from tools.draft_head.store import Conversation, Work
from tools.draft_head.turns import KINDS, RefusedError, Reply, Turn
from tools.draft_head.writer import Writer, Written

Say = Callable[[str], None]
#: A conversation that is being written: asks for texts, one at a time, and returns what came of it.
Writing = Generator[Request, Written, list[Conversation]]

#: Attempts at a conversation before it is given up.
ATTEMPTS = 6
#: How the user's turns are sampled: varied, without the tail that leads a small model astray. min-p costs next to
#: nothing; top-p, which the whole batch would pay for, does no better here.
TURN_TEMPERATURE, TURN_MIN_P = 0.8, 0.05
#: Conversations that one number can give: its own, and those that it grew from.
PER_NUMBER = 16
#: Tokens of a prompt that are kept free beside a passage: for the template, the instruction and a question.
_AROUND = 112
#: An answer that has said the same for so many tokens, and so often, is cut: the head has seen it by then.
LOOP_TOKENS, LOOP_TIMES, _LOOP_EVERY = 64, 4, 16


def run(work: Work, recipe: Recipe, say: Say) -> None:
    """Writes shards until there are as many answer tokens as the recipe wants. Raises ConfigError and ModelError."""
    shards = work.data_shards()
    if shards != [work.data_shard(index) for index in range(len(shards))]:
        raise ConfigError(f"{work.data}: a shard is missing; remove those that come after the gap")
    known: set[tuple[int, ...]] = set()
    tokens = 0
    for path in shards:
        for conversation in work.open_conversations(path):
            known.add(conversation.prompt)
            tokens += len(conversation.answer)
    if tokens >= recipe.data.tokens:
        say(f"{tokens:,} answer tokens are there")
        return
    studio = Studio.open(recipe, known, say)
    with Progress(recipe.data.tokens, "answer tokens", say, done=tokens) as progress:
        index = len(shards)
        while tokens < recipe.data.tokens:
            shard: list[Conversation] = []
            for done in studio.shard(index):
                shard += done
                # A shard's first conversations end late: what is written meanwhile shows that it goes on.
                note = f"{studio.writer.tokens:,} tokens written in all"
                progress.add(sum(len(conversation.answer) for conversation in done), note)
            if not shard:
                raise ConfigError(f"data.max_prompt_tokens: nothing fits {recipe.data.max_prompt_tokens} tokens")
            work.write_conversations(work.data_shard(index), sorted(shard, key=lambda one: one.id))
            tokens += sum(len(conversation.answer) for conversation in shard)
            index += 1


@dataclass(frozen=True)
class Studio:
    """Writes shards with one loaded model. Prompts in `known` are refused, and new ones join it."""

    recipe: Recipe
    format: ChatFormat
    writer: Writer
    known: set[tuple[int, ...]]

    @classmethod
    def open(cls, recipe: Recipe, known: set[tuple[int, ...]], say: Say) -> Studio:
        """Loads the model. Raises ConfigError and ModelError."""
        data = recipe.data
        config = Config().override(
            **{
                "model.model": recipe.model,
                "model.draft": "none",
                "model.tree": "none",
                "model.dtype": recipe.dtype,
                "model.provider": recipe.provider,
                "model.device": recipe.device,
                "engine.threads": recipe.threads,
                "engine.compile": data.compile and recipe.provider == "vllm",
                "engine.kv_cache_mib": data.kv_cache_mib,
                "engine.max_batch": data.in_flight + 1,  # one slot keeps what all prompts begin with
                "engine.batch_buckets": [1, 2, 4, *range(8, data.in_flight, 8), data.in_flight],
                "engine.max_model_len": data.max_prompt_tokens + max(data.max_prompt_tokens, data.max_answer_tokens),
            }
        )
        chats = ChatFormat.of(locate_model(recipe.model, say))
        models, _ = assemble(config, say)
        writer = Writer(models, config.engine, cut=loops)
        writer.share(chats.turn_prompt((), ""))
        return cls(recipe, chats, writer, known)

    def shard(self, index: int) -> Iterator[list[Conversation]]:
        """The conversations of a shard, in the order in which they end: those that each step ends."""
        count = self.recipe.data.shard_conversations
        order = list(KINDS)
        numbers = sorted(range(index * count, (index + 1) * count), key=lambda number: order.index(self.kind(number)))
        waiting, writing = deque(numbers), dict[str, Writing]()
        while waiting or writing:
            done: list[Conversation] = []
            while waiting and len(writing) < self.recipe.data.in_flight:
                done += self._go_on(self.conversation(waiting.popleft()), None, writing)
            for written in self.writer.step():
                done += self._go_on(writing.pop(written.request_id), written, writing)
            yield done

    def _go_on(self, one: Writing, written: Written | None, writing: dict[str, Writing]) -> list[Conversation]:
        """Takes a conversation to its next request, or to its end."""
        try:
            request = next(one) if written is None else one.send(written)
        except StopIteration as end:
            conversations: list[Conversation] = end.value
            return conversations
        self.writer.submit(request)
        writing[request.request_id] = one
        return []

    def kind(self, number: int) -> str:
        shares = self.recipe.data.shares
        draw = random.Random(f"{self.recipe.seed} kind {number}")
        return draw.choices(list(KINDS), [getattr(shares, kind) for kind in KINDS])[0]

    def _temperature(self, number: int) -> float:
        return self.recipe.data.temperatures[number % len(self.recipe.data.temperatures)]

    def conversation(self, number: int) -> Writing:
        """One conversation, if an attempt gives one, and those that it grew from."""
        done: list[Conversation] = []
        for attempt in range(ATTEMPTS):
            try:
                done.append((yield from self._attempt(number, attempt, done)))
                break
            except RefusedError:
                continue
        return done

    def _attempt(
        self, number: int, attempt: int, done: list[Conversation]
    ) -> Generator[Request, Written, Conversation]:
        data, kind = self.recipe.data, self.kind(number)
        draw = random.Random(f"{self.recipe.seed} script {number} {attempt}")
        script = KINDS[kind](draw, max(data.max_prompt_tokens - _AROUND, data.max_prompt_tokens // 4))
        name = f"{number} {attempt}"
        try:
            asked = next(script)
            while True:
                name += "+"
                if isinstance(asked, Turn):
                    text = yield from self._turn(asked, name)
                else:
                    text = yield from self._reply(asked, number, attempt, name, done)
                asked = script.send(text)
        except StopIteration as end:
            prompt = self._fresh(self.format.answer_prompt(end.value))
        temperature = self._temperature(number)
        written = yield self._request(f"{name}=", prompt, data.max_answer_tokens, temperature)
        return Conversation(number * PER_NUMBER, kind, temperature, prompt, written.token_ids)

    def _turn(self, asked: Turn, name: str) -> Generator[Request, Written, str]:
        prompt = self.format.turn_prompt(asked.chat, asked.begun)
        written = yield self._request(name, prompt, asked.tokens, TURN_TEMPERATURE, self.format.turn_ends, TURN_MIN_P)
        said = self.format.text(written.token_ids)
        if not said.strip():
            raise RefusedError
        return (asked.begun + said).strip()

    def _reply(
        self, asked: Reply, number: int, attempt: int, name: str, done: list[Conversation]
    ) -> Generator[Request, Written, str]:
        # The next of the temperatures, so that these answers, too, have each of them as often.
        prompt, temperature = self.format.answer_prompt(asked.chat), self._temperature(number + attempt + 1)
        written = yield self._request(name, prompt, asked.tokens, temperature)
        text = self.format.text(written.token_ids)
        if not text.strip():
            raise RefusedError
        if prompt not in self.known:
            self.known.add(prompt)
            answer = written.token_ids[: self.recipe.data.max_answer_tokens]
            done.append(Conversation(number * PER_NUMBER + 1 + len(done), asked.keep, temperature, prompt, answer))
        if written.finish is None:  # it was cut where it looped: an answer to learn from, but no passage to ask about
            raise RefusedError
        return text

    def _fresh(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        if prompt in self.known:
            raise RefusedError
        self.known.add(prompt)
        return prompt

    def _request(
        self,
        name: str,
        prompt: tuple[int, ...],
        tokens: int,
        temperature: float,
        ends: tuple[int, ...] = (),
        min_p: float = 0.0,
    ) -> Request:
        if len(prompt) > min(self.recipe.data.max_prompt_tokens, self.writer.max_model_len - tokens):
            raise RefusedError
        seed = int.from_bytes(hashlib.blake2b(f"{self.recipe.seed} {name}".encode(), digest_size=8).digest()) >> 1
        stops = tuple(dict.fromkeys((*self.writer.stop_token_ids, *ends)))
        return Request(name, prompt, tokens, SamplingParams(temperature, seed=seed, min_p=min_p), stop_token_ids=stops)


def loops(token_ids: Sequence[int]) -> bool:
    """Whether the end repeats itself, LOOP_TIMES at least and for LOOP_TOKENS; now and then, for it takes time."""
    if len(token_ids) < LOOP_TOKENS or len(token_ids) % _LOOP_EVERY:
        return False
    end = list(token_ids[-LOOP_TOKENS:])
    return any(end[period:] == end[:-period] for period in range(1, LOOP_TOKENS // LOOP_TIMES + 1))
