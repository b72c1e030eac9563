"""A client's request to a journal entry: everything checked, every default resolved.

All errors are InvalidRequestError and name the field. The cheap checks come first: nothing is tokenised for a request
that is refused anyway.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from branchline.core import MAX_STOP_TOKEN_IDS, InvalidRequestError, SamplingParams
from branchline.v1 import gateway_pb2
from gateway.journal import JournalEntry
from gateway.tokens import Message, Tokens

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_OWN_STOP_TOKEN_IDS = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_model_len`: the workers' longest sequence, prompt and output; `max_tokens`: the gateway's own limit."""

    max_model_len: int
    max_tokens: int


async def resolve(request: gateway_pb2.GenerateRequest, tokens: Tokens, limits: Limits) -> JournalEntry:
    """Raises InvalidRequestError."""
    sampling = _sampling(request)
    stop = _stop_strings(request.stop)
    stop_token_ids = _stop_token_ids(request, tokens)
    if request.HasField("max_tokens"):
        _check_max_tokens(request.max_tokens, limits)
    prompt = await _prompt(request, tokens, limits)
    return JournalEntry(
        request_id=secrets.token_hex(8),
        prompt=prompt,
        max_tokens=_max_tokens(request, len(prompt), limits),
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        stop=stop,
    )


def _sampling(request: gateway_pb2.GenerateRequest) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,  # unset reads 0, which is its default
        top_p=request.top_p if request.HasField("top_p") else 1.0,
        top_k=request.top_k,
        seed=request.seed if request.HasField("seed") else secrets.randbits(63),
    )


def _stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(f"stop: at most {MAX_STOPS} strings, got {len(stops)}")
    for index, stop in enumerate(stops):
        if not stop:
            raise InvalidRequestError(f"stop[{index}]: must not be empty")
        if len(stop) > MAX_STOP_CHARS:
            raise InvalidRequestError(f"stop[{index}]: at most {MAX_STOP_CHARS} characters, got {len(stop)}")
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(request: gateway_pb2.GenerateRequest, tokens: Tokens) -> tuple[int, ...]:
    own = request.stop_token_ids
    if len(own) > MAX_OWN_STOP_TOKEN_IDS:
        raise InvalidRequestError(f"stop_token_ids: at most {MAX_OWN_STOP_TOKEN_IDS}, got {len(own)}")
    _check_ids("stop_token_ids", own, tokens.vocab_size)
    ids = tuple(dict.fromkeys([*(() if request.ignore_eos else tokens.eos_ids), *own]))
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"stop_token_ids: with the model's {len(tokens.eos_ids)} end-of-sequence tokens these are {len(ids)},"
            f" at most {MAX_STOP_TOKEN_IDS} can be watched"
        )
    return ids


def _check_max_tokens(max_tokens: int, limits: Limits) -> None:
    if max_tokens < 1:
        raise InvalidRequestError(f"max_tokens: must be at least 1, got {max_tokens}")
    if max_tokens > limits.max_tokens:
        raise InvalidRequestError(f"max_tokens: this gateway allows at most {limits.max_tokens}, got {max_tokens}")


def _max_tokens(request: gateway_pb2.GenerateRequest, prompt_length: int, limits: Limits) -> int:
    left = limits.max_model_len - prompt_length
    if not request.HasField("max_tokens"):
        return min(left, limits.max_tokens)
    if request.max_tokens > left:
        raise InvalidRequestError(
            f"max_tokens: a prompt of {prompt_length} tokens leaves {left} of the context limit of"
            f" {limits.max_model_len}, got {request.max_tokens}"
        )
    return request.max_tokens


async def _prompt(request: gateway_pb2.GenerateRequest, tokens: Tokens, limits: Limits) -> tuple[int, ...]:
    field = request.WhichOneof("input")
    match field:
        case "prompt":
            _check_chars(field, len(request.prompt), tokens, limits)
            ids = await tokens.encode(request.prompt) if request.prompt else ()
        case "chat":
            ids = await tokens.encode_chat(_messages(request.chat, tokens, limits))
        case "token_ids":
            _check_length(field, len(request.token_ids.ids), limits)
            ids = tuple(request.token_ids.ids)
            _check_ids(field, ids, tokens.vocab_size)
        case _:
            raise InvalidRequestError("input: one of prompt, chat and token_ids must be given")
    if not ids:
        raise InvalidRequestError(f"{field}: the prompt is empty")
    _check_length(field, len(ids), limits)
    return ids


def _messages(chat: gateway_pb2.ChatMessages, tokens: Tokens, limits: Limits) -> list[Message]:
    if not chat.messages:
        raise InvalidRequestError("chat.messages: at least one message must be given")
    if len(chat.messages) > limits.max_model_len:
        raise InvalidRequestError(f"chat.messages: {len(chat.messages)} are too many for the context limit")
    _check_chars("chat", sum(len(message.content) for message in chat.messages), tokens, limits)
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequestError(f"chat.messages[{index}].role: must not be empty")
    return [Message(message.role, message.content) for message in chat.messages]


def _check_chars(field: str, chars: int, tokens: Tokens, limits: Limits) -> None:
    """Refuses what must be too long even if every token were the vocabulary's longest, before it costs anything."""
    most = limits.max_model_len * tokens.longest_token
    if chars > most:
        raise InvalidRequestError(
            f"{field}: too long: {chars} characters can't fit the context limit of {limits.max_model_len} tokens"
        )


def _check_length(field: str, length: int, limits: Limits) -> None:
    if length >= limits.max_model_len:
        raise InvalidRequestError(
            f"{field}: the prompt has {length} tokens; the context limit of {limits.max_model_len} must leave room"
            " for at least one more"
        )


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            raise InvalidRequestError(f"{field}[{index}]: {token_id} is not below the vocabulary size of {vocab_size}")
