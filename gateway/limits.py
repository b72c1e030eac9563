"""What a request must keep to, and the checks that more than one kind of field needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.core import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_model_len`: the workers' longest sequence, prompt and output; `max_tokens`: the gateway's own limit."""

    max_model_len: int
    max_tokens: int


def check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequestError for the first id that is not below `vocab_size`."""
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            raise InvalidRequestError(f"{field}[{index}]: {token_id} is not below the vocabulary size of {vocab_size}")


def check_range(field: str, value: int, low: int, high: int) -> int:
    """`value`. Raises InvalidRequestError when it is not between `low` and `high`."""
    if not low <= value <= high:
        raise InvalidRequestError(f"{field}: must be between {low} and {high}, got {value}")
    return value
