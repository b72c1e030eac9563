"""The options of a generation and the request message made of them.

Only mistakes of type and shape are found here, those that a message cannot even carry; what a value means, and
whether it is allowed, the gateway decides.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from branchline.client.errors import InvalidRequestError
from branchline.v1 import gateway_pb2

#: Seconds that a call may take when nobody says otherwise.
DEFAULT_TIMEOUT_S = 600.0


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `complete`. Exactly one of the first three is needed."""

    prompt: str
    #: A chat: [{"role": "user", "content": "…"}, …]; the model's chat template is applied.
    messages: Sequence[Mapping[str, str]]
    token_ids: Sequence[int]
    #: At least 1. Default: what the context leaves, up to the gateway's limit.
    max_tokens: int | None
    #: 0, the default, is greedy.
    temperature: float | None
    #: Above 0, at most 1, which is the default and keeps every token.
    top_p: float | None
    #: 0, the default, keeps every token.
    top_k: int | None
    #: The same seed gives the same tokens. Default: drawn by the gateway and told in the result.
    seed: int | None
    #: Generation ends before any of these strings.
    stop: str | Sequence[str] | None
    #: Go on past the model's end-of-sequence tokens.
    ignore_eos: bool
    #: More token ids that end the generation.
    stop_token_ids: Sequence[int]


def generate_request(
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    token_ids: Sequence[int] | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    ignore_eos: bool = False,
    stop_token_ids: Sequence[int] = (),
) -> gateway_pb2.GenerateRequest:
    """Raises InvalidRequestError, naming the option, for a value that the message cannot carry."""
    given = [
        name
        for name, value in (("prompt", prompt), ("messages", messages), ("token_ids", token_ids))
        if value is not None
    ]
    if len(given) != 1:
        raise InvalidRequestError(
            f"exactly one of prompt, messages and token_ids is needed, got {' and '.join(given) or 'none'}"
        )
    if not isinstance(ignore_eos, bool):
        raise InvalidRequestError(f"ignore_eos: must be True or False, got {ignore_eos!r}")
    request = gateway_pb2.GenerateRequest(
        ignore_eos=ignore_eos,
        stop=[] if stop is None else [_text("stop", item) for item in ([stop] if isinstance(stop, str) else stop)],
        stop_token_ids=_ids("stop_token_ids", stop_token_ids),
    )
    if prompt is not None:
        request.prompt = _text("prompt", prompt)
    elif messages is not None:
        request.chat.CopyFrom(_chat(messages))
    elif token_ids is not None:
        request.token_ids.CopyFrom(gateway_pb2.TokenIds(ids=_ids("token_ids", token_ids)))
    if max_tokens is not None:
        request.max_tokens = _integer("max_tokens", max_tokens, -(2**63), 2**63 - 1)
    if temperature is not None:
        request.temperature = _number("temperature", temperature)
    if top_p is not None:
        request.top_p = _number("top_p", top_p)
    if top_k is not None:
        request.top_k = _integer("top_k", top_k, -(2**63), 2**63 - 1)
    if seed is not None:
        request.seed = _integer("seed", seed, 0, 2**63 - 1)
    return request


def deadline(timeout: float) -> float:
    """The seconds that a call has. Every call has an end: infinity is refused."""
    seconds = _number("timeout", timeout)
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequestError(f"timeout: must be a positive number of seconds, got {seconds}")
    return seconds


def _chat(messages: Sequence[Mapping[str, str]]) -> gateway_pb2.ChatMessages:
    if isinstance(messages, str | Mapping):
        raise InvalidRequestError("messages: must be a list of {'role': …, 'content': …}")
    chat = gateway_pb2.ChatMessages()
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidRequestError(f"messages[{index}]: must have the keys 'role' and 'content', got {message!r}")
        chat.messages.add(
            role=_text(f"messages[{index}].role", message["role"]),
            content=_text(f"messages[{index}].content", message["content"]),
        )
    return chat


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name}: must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name}: the character at {error.start} is half of a surrogate pair and has no UTF-8 form"
        ) from None
    return value


def _ids(name: str, values: Sequence[int]) -> list[int]:
    if isinstance(values, str | bytes):
        raise InvalidRequestError(f"{name}: must be a list of integers, got {type(values).__name__}")
    return [_integer(f"{name}[{index}]", value, 0, 2**32 - 1) for index, value in enumerate(values)]


def _integer(name: str, value: Any, low: int, high: int) -> int:
    """Takes whatever is an integer by Python's own rule (NumPy's are), except bool."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InvalidRequestError(f"{name}: must be an integer, got {value!r}")
    if not low <= number <= high:
        raise InvalidRequestError(f"{name}: must be between {low} and {high}, got {number}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool | str | bytes):
        raise InvalidRequestError(f"{name}: must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequestError(f"{name}: must be a number, got {value!r}") from None
