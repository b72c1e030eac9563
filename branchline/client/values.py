"""A caller's values, as the messages carry them. Each function raises InvalidRequestError, naming the option."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from branchline.client.errors import InvalidRequestError
from branchline.v1 import gateway_pb2, types_pb2

_LARGEST_ID = 2**32 - 1


def chat_value(messages: Sequence[Mapping[str, str]]) -> gateway_pb2.ChatMessages:
    if isinstance(messages, str | Mapping):
        raise InvalidRequestError("messages: must be a list of {'role': …, 'content': …}")
    chat = gateway_pb2.ChatMessages()
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidRequestError(f"messages[{index}]: must have the keys 'role' and 'content', got {message!r}")
        chat.messages.add(
            role=text_value(f"messages[{index}].role", message["role"]),
            content=text_value(f"messages[{index}].content", message["content"]),
        )
    return chat


def text_value(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name}: must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name}: the character at {error.start} is half of a surrogate pair and has no UTF-8 form"
        ) from None
    return value


def texts_value(name: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, str | bytes):  # its characters are hardly meant
        raise InvalidRequestError(f"{name}: must be a list of strings, got {type(values).__name__}")
    return [text_value(name, value) for value in values]


def ids_value(name: str, values: Sequence[int]) -> list[int]:
    if isinstance(values, str | bytes):
        raise InvalidRequestError(f"{name}: must be a list of integers, got {type(values).__name__}")
    return [integer_value(f"{name}[{index}]", value, 0, _LARGEST_ID) for index, value in enumerate(values)]


def biases_value(values: Mapping[int, float]) -> list[types_pb2.LogitBias]:
    if not isinstance(values, Mapping):
        raise InvalidRequestError(f"logit_bias: must map token ids to numbers, got {type(values).__name__}")
    return [
        types_pb2.LogitBias(
            token_id=integer_value("logit_bias: a token id", token_id, 0, _LARGEST_ID),
            bias=number_value(f"logit_bias[{token_id}]", bias),
        )
        for token_id, bias in values.items()
    ]


def integer_value(name: str, value: Any, low: int, high: int) -> int:
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


def number_value(name: str, value: Any) -> float:
    if isinstance(value, bool | str | bytes):
        raise InvalidRequestError(f"{name}: must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequestError(f"{name}: must be a number, got {value!r}") from None
