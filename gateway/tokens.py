"""The model's tokenizer and chat template, as its directory has them."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from transformers import AutoTokenizer

from branchline.core import InvalidRequestError
from branchline.engine.models.errors import ModelError
from gateway.conversation import Conversation
from gateway.detokenize import Detokenizer
from gateway.token_bytes import token_bytes

#: Characters of input above which encoding leaves the event loop: about a millisecond's work.
_LONG_INPUT = 4096
#: What a template may raise at messages that it was not written for; jinja2's sandbox and `raise_exception` included.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

Input = TypeVar("Input")


class Tokens:
    """Text to ids and back. Call it from one event loop; `close` it in the end."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        """`tokenizer` as AutoTokenizer makes it; `vocab_size` is the model's, which may be padded."""
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self._tokenizer = tokenizer
        self._special_ids = _special_ids(tokenizer)
        # Long inputs are encoded by one thread on a tokenizer of its own: tokenizers must not be shared by threads.
        self._spare = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        lengths = (len(token) for token in tokenizer.get_vocab())
        self.longest_token = max(lengths, default=1)
        #: Whether the chat template shows tools to the model.
        self.knows_tools = _mentions(tokenizer.chat_template, "tools")

    @classmethod
    def load(cls, directory: Path) -> Tokens:
        """Reads the tokenizer of a model directory. Raises ModelError."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            config = _read_json(directory / "config.json")
            generation = _read_json(directory / "generation_config.json")
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{directory.name}: its tokenizer can't be loaded: {error}") from error
        text_config = config.get("text_config", config)  # multimodal models keep the language model's part there
        vocab_size = int(text_config.get("vocab_size") or len(tokenizer))
        eos_ids = _eos_ids((generation, text_config, config), tokenizer.eos_token_id)
        return cls(tokenizer, vocab_size=vocab_size, eos_ids=eos_ids)

    def close(self) -> None:
        """Lets the thread end; what it encodes is finished, what waits is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a raw prompt, with the special tokens that the model's own rule adds (often none)."""
        return await self._run(_encode_text, text, len(text))

    async def encode_chat(self, chat: Conversation) -> tuple[int, ...]:
        """The ids of a chat, ready for the assistant's answer. Raises InvalidRequestError when the template refuses, or
        there are tools and it knows none.
        """
        if chat.tools and not self.knows_tools:
            raise InvalidRequestError("chat.tools: the model's chat template knows no tools")
        return await self._run(_encode_chat, chat, chat.size)

    def encode_word(self, text: str) -> tuple[int, ...]:
        """The ids of a short text as it stands, without special tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    @property
    def tokenizer(self) -> Any:
        """As AutoTokenizer makes it, for libraries that want one; on the event loop only."""
        return self._tokenizer

    def detokenizer(self, *, special_tokens: bool = False) -> Detokenizer:
        """`special_tokens`: show them by their names, except those that end a text."""
        if special_tokens:
            return Detokenizer(self.decode_all, frozenset(self.eos_ids))
        return Detokenizer(self.decode, self._special_ids)

    def decode(self, ids: list[int]) -> str:
        """All of the text at once, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def decode_all(self, ids: list[int]) -> str:
        """All of the text at once, special tokens by their names."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def piece(self, token_id: int) -> str:
        """One token on its own, a special one by its name; part of a character shows as U+FFFD."""
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return text

    def piece_bytes(self, token_id: int) -> bytes | None:
        """One token's bytes, also of part of a character; None when the tokenizer does not tell."""
        return token_bytes(self._tokenizer, token_id, self.piece(token_id))

    async def _run(self, encode: Callable[[Any, Input], tuple[int, ...]], value: Input, size: int) -> tuple[int, ...]:
        if size <= _LONG_INPUT:
            return encode(self._tokenizer, value)
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode, self._spare, value)


def _encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    # verbose=False: no warning about long inputs, whose length is checked where the limit is known.
    return tuple(tokenizer.encode(text, verbose=False))


def _encode_chat(tokenizer: Any, chat: Conversation) -> tuple[int, ...]:
    """transformers renders in jinja2's immutable sandbox: a template reaches its variables and nothing else."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            tools=[dict(tool) for tool in chat.tools] or None,
            tokenize=False,
            add_generation_prompt=True,
            **chat.arguments,
        )
    except _TEMPLATE_ERRORS as error:
        raise InvalidRequestError(f"chat: the model's chat template refuses these messages: {error}") from error
    # The template has written the special tokens.
    return tuple(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _mentions(template: str | dict[str, str] | None, variable: str) -> bool:
    """A model may have several templates, by name."""
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(re.search(rf"\b{variable}\b", text) for text in texts)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _eos_ids(configs: Sequence[dict[str, Any]], tokenizer_eos: int | None) -> tuple[int, ...]:
    """The ids that end a text: those of the first of `configs` that names any, and the tokenizer's own.

    generation_config.json comes first: a chat model often ends with another token than the model it was made from.
    """
    named: int | list[int] = next(
        (config["eos_token_id"] for config in configs if config.get("eos_token_id") is not None), []
    )
    ids = [*(named if isinstance(named, list) else [named]), *([] if tokenizer_eos is None else [tokenizer_eos])]
    return tuple(dict.fromkeys(int(index) for index in ids))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content
