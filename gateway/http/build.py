"""Values of OpenAI's types, as an answer writes them: with the fields that are given, and no others."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from openai import BaseModel

T = TypeVar("T", bound=BaseModel)

#: Stands for a field that is not to be written at all; None is written as null.
OMIT: Final = object()


def build(kind: type[T], **fields: Any) -> T:
    """Not validated: it is our own, some of it in the middle of a stream is not there yet, and some (`token_ids`,
    `reasoning`) is vLLM's.
    """
    return kind.construct(**{name: value for name, value in fields.items() if value is not OMIT})


def as_json(value: BaseModel) -> str:
    """Of a value that was built."""
    return value.model_dump_json(exclude_unset=True)
