"""The model's chat template, for both sides of a chat: the model can write either."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchline.engine.models.errors import ModelError
from tools.draft_head.turns import Chat, user

#: Stands for what a user says; nothing that a template would change.
_MARK = "qzxjvk"


@dataclass(frozen=True)
class ChatFormat:
    """`turn_ends` are the token ids that end a user's turn where the model writes it."""

    tokenizer: Any
    turn_ends: tuple[int, ...]

    @classmethod
    def of(cls, model_dir: Path) -> ChatFormat:
        """Raises ModelError for a model without a chat template."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        if not tokenizer.chat_template:
            raise ModelError(f"{model_dir}: the tokenizer has no chat template, and the data are chats")
        behind = _around(tokenizer, ())[1]
        return cls(tokenizer, tuple(tokenizer.encode(behind, add_special_tokens=False)[:1]))

    def answer_prompt(self, chat: Chat) -> tuple[int, ...]:
        """A chat up to and with the assistant's header."""
        text = self.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
        return self._encode(text)

    def turn_prompt(self, chat: Chat, begun: str) -> tuple[int, ...]:
        """A chat up to where the user's next turn, of which `begun` is there, goes on."""
        return self._encode(_around(self.tokenizer, chat)[0] + begun)

    def text(self, token_ids: Iterable[int]) -> str:
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        # The template has written the special tokens.
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _around(tokenizer: Any, chat: Chat) -> tuple[str, str]:
    """What the template writes before and behind the user's next turn."""
    text = tokenizer.apply_chat_template([*chat, user(_MARK)], tokenize=False, add_generation_prompt=True)
    before, found, behind = text.rpartition(_MARK)
    if not found:
        raise ModelError("the chat template doesn't show what the user says")
    return before, behind
