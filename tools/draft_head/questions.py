"""The prompts that a head is evaluated with: a Spec-Bench file, each line a question with its category."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchline.config import ConfigError
from branchline.core import Request, SamplingParams
from tools.draft_head.recipe import Recipe

#: The repository; a recipe's file is looked for here too, so that the tool runs from anywhere.
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Question:
    """`prompt` are token ids, the chat template and the assistant's header included."""

    name: str
    category: str
    prompt: tuple[int, ...]

    def request(self, max_tokens: int, temperature: float, seed: int, stop: tuple[int, ...]) -> Request:
        sampling = SamplingParams(temperature, seed=zlib.crc32(f"{seed} {self.name}".encode()))
        return Request(self.name, self.prompt, max_tokens, sampling, stop_token_ids=stop)


def read_questions(
    recipe: Recipe, model_dir: Path, context: int, say: Callable[[str], None]
) -> tuple[list[Question], list[Question]]:
    """Questions to measure with, and others to search tree shapes with, so that a shape isn't measured on the prompts
    that it was found on; both are the same where the file has no more. A `context` must hold a prompt and its answer.

    Raises ConfigError for a file that can't be read.
    """
    from transformers import AutoTokenizer

    settings = recipe.evaluate
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def encode(turn: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": turn}]
        ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return tuple(ids)

    path = Path(settings.prompts)
    path = path if path.exists() else ROOT / path
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        questions = [
            Question(str(entry["question_id"]), entry["category"], encode(entry["turns"][0])) for entry in entries
        ]
    except OSError as error:
        raise ConfigError(f"evaluate.prompts: {path}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"evaluate.prompts: {path}: not a Spec-Bench file: {error!r}") from error
    fitting = [question for question in questions if len(question.prompt) + settings.max_tokens <= context]
    if not fitting:
        raise ConfigError(f"evaluate.prompts: {path}: no prompt leaves room for {settings.max_tokens} tokens")
    if left_out := len(questions) - len(fitting):
        say(f"{left_out} of {len(questions)} prompts are too long for a context of {context} tokens and left out")
    measured = spread(fitting, settings.limit)
    others = [question for question in fitting if question not in measured]
    return measured, spread(others or measured, settings.foreseen)


def spread(items: list[Question], count: int) -> list[Question]:
    """At most `count` items, evenly spread."""
    step = max(len(items) / count, 1.0)
    return [items[int(index * step)] for index in range(min(count, len(items)))]
