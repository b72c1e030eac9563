"""What a policy is asked, and what it is told."""

# ruff: noqa: ARG002 - not every policy looks at everything

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.pool import Pair
from gateway.worker import Worker

#: A worker loses a preference when it would have more than this multiple of its share of all requests, and `SLACK`
#: more: at low load the share says little, and a second request beside a first one costs a worker next to nothing.
SHARES = 1.25
SLACK = 1


@dataclass(slots=True)
class Demand:
    """What is to be placed: the token ids of prompt and emitted tokens, and the client's name for the session ("" for
    none), for `samples` that go together."""

    context: tuple[int, ...]
    session: str = ""
    samples: int = 1
    _keys: tuple[int, ...] | None = None

    def keys(self, block_size: int) -> tuple[int, ...]:
        """Of the context's whole blocks; computed once."""
        if self._keys is None:
            self._keys = block_keys(self.context, block_size)
        return self._keys


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a policy thinks of a context's tokens at a prefill worker: that so many are `cached` there, and that so many
    will have to be computed (more than are left, where it doesn't trust its own guess)."""

    cached: int = 0
    computed: int = 0


class Policy(ABC):
    """Orders pairs for one request, and learns from what was placed. Belongs to one event loop.

    It chooses on both sides by themselves, so an order of pairs is one of decode workers, and for each one of prefill
    workers. In each order the workers that failed lately come last.
    """

    @abstractmethod
    def order(self, pairs: Sequence[Pair], demand: Demand) -> list[Pair]:
        """All of them, of which there is one at least, best first."""

    def placed(self, pair: Pair, demand: Demand, held_tokens: int) -> Forecast:
        """It goes there; the decode worker has `held_tokens` of the context."""
        return Forecast(0, len(demand.context))

    def computed(self, prefill: Worker, forecast: Forecast, cached_tokens: int) -> None:  # noqa: B027 - may be ignored
        """The prefill worker has a first token; it had `cached_tokens` of the context."""

    def has(self, decode: Worker, token_ids: tuple[int, ...]) -> None:  # noqa: B027 - may be ignored
        """The decode worker has the KV of a context that begins like this."""


def ordered(pairs: Sequence[Pair], prefill: Callable[[Worker], Any], decode: Callable[[Worker], Any]) -> list[Pair]:
    """By the two functions' values, smallest first; each is called once for a worker."""
    prefills = {pair.prefill: (pair.prefill.avoided, prefill(pair.prefill)) for pair in pairs}
    decodes = {pair.decode: (pair.decode.avoided, decode(pair.decode)) for pair in pairs}
    return sorted(pairs, key=lambda pair: (decodes[pair.decode], prefills[pair.prefill]))


def share_limit(workers: Collection[Worker], more: int = 1) -> int:
    """The load up to which, with `more` requests to come, a worker of these may be preferred for another reason."""
    total = sum(worker.load for worker in workers) + more
    return math.ceil(SHARES * total / len(workers)) + SLACK


def block_keys(token_ids: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The keys of the whole blocks in front: chained, so that equal keys mean equal beginnings.

    Python's own hash is enough: a key that two beginnings share costs a wrong guess here, while what a worker takes
    from its cache is decided by its own, cryptographic keys.
    """
    keys, key = [], 0
    for end in range(block_size, len(token_ids) + 1, block_size):
        key = hash((key, *token_ids[end - block_size : end]))
        keys.append(key)
    return tuple(keys)
