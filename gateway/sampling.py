"""A request's options of sampling, checked, with strings made token ids."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from branchline.core import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    InvalidRequestError,
    SamplingParams,
)
from branchline.v1 import gateway_pb2, types_pb2
from gateway.limits import check_ids
from gateway.tokens import Tokens


def sampling_params(request: gateway_pb2.GenerateRequest, tokens: Tokens) -> SamplingParams:
    """Of sample 0. Raises InvalidRequestError."""
    return SamplingParams(  # whose checks name the field; unset numbers read 0, which is the default of most
        temperature=request.temperature,
        top_p=request.top_p if request.HasField("top_p") else 1.0,
        top_k=request.top_k,
        seed=request.seed if request.HasField("seed") else secrets.randbits(63),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty if request.HasField("repetition_penalty") else 1.0,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_logit_bias(request.logit_bias, tokens),
        bad_words=_bad_words(request.bad_words, tokens),
    )


def _logit_bias(entries: Sequence[types_pb2.LogitBias], tokens: Tokens) -> tuple[tuple[int, float], ...]:
    if len(entries) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(f"logit_bias: at most {MAX_LOGIT_BIASES} tokens, got {len(entries)}")
    check_ids("logit_bias", [entry.token_id for entry in entries], tokens.vocab_size)
    return tuple((entry.token_id, entry.bias) for entry in entries)


def _bad_words(words: Sequence[str], tokens: Tokens) -> tuple[tuple[int, ...], ...]:
    """The token sequences of the words as they stand and behind a space, each once: with most tokenizers a word in
    the middle of a text is other tokens than at its beginning.
    """
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequestError(f"bad_words: at most {MAX_BAD_WORDS}, got {len(words)}")
    sequences: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        if not word:
            raise InvalidRequestError(f"bad_words[{index}]: must not be empty")
        for text in (word, f" {word}"):
            sequences[_word_ids(index, word, text, tokens)] = None
    if len(sequences) > MAX_BAD_WORDS:
        raise InvalidRequestError(
            f"bad_words: with and without a space before them these are {len(sequences)} token sequences,"
            f" at most {MAX_BAD_WORDS} can be watched"
        )
    return tuple(sequences)


def _word_ids(index: int, word: str, text: str, tokens: Tokens) -> tuple[int, ...]:
    # Nothing that must be too long is tokenised.
    ids = tokens.encode_word(text) if len(text) <= MAX_BAD_WORD_TOKENS * tokens.longest_token else None
    if ids is None or len(ids) > MAX_BAD_WORD_TOKENS:
        length = "" if ids is None else f", got {len(ids)}"
        shown = word if len(word) <= 40 else f"{word[:40]}…"
        raise InvalidRequestError(f"bad_words[{index}]: {shown!r} has more than {MAX_BAD_WORD_TOKENS} tokens{length}")
    if not ids:
        raise InvalidRequestError(f"bad_words[{index}]: {word!r} has no tokens")
    return ids
