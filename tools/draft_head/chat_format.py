"""The model's chat template in pieces, for both sides of a chat: the model can write either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchline.engine.models.errors import ModelError

#: Stand for what is said; nothing that a template would change.
_MARKS = ("qzxjvk", "vkqzxj", "jvkqzx")


@dataclass(frozen=True)
class ChatFormat:
    """Token ids: `opening` up to where a user's first turn begins, `to_answer` from the end of a user's turn to where
    the answer begins, `to_turn` from the end of an answer to where the next turn begins."""

    tokenizer: Any
    opening: tuple[int, ...]
    to_answer: tuple[int, ...]
    to_turn: tuple[int, ...]

    @classmethod
    def of(cls, model_dir: Path) -> ChatFormat:
        """Raises ModelError for a model without a chat template, or with one that is not understood."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        if not tokenizer.chat_template:
            raise ModelError(f"{model_dir}: the tokenizer has no chat template, and the data are chats")
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
        text: Any = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        pieces = []
        for mark in _MARKS:
            before, found, text = text.partition(mark)
            if not found:
                raise ModelError(f"{model_dir}: the chat template doesn't show what is said")
            # The template has written the special tokens.
            pieces.append(tuple(tokenizer.encode(before, add_special_tokens=False)))
        opening, to_answer, to_turn = pieces
        if not opening:
            raise ModelError(f"{model_dir}: the chat template has nothing before a user's turn")
        return cls(tokenizer, opening, to_answer, to_turn)

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def tokens_with(self, characters: str) -> frozenset[int]:
        """Ids of the tokens whose text has one of `characters`."""
        ids = range(len(self.tokenizer))
        texts = self.tokenizer.batch_decode([[one] for one in ids], clean_up_tokenization_spaces=False)
        return frozenset(one for one, text in zip(ids, texts, strict=True) if any(c in text for c in characters))
