"""Policies that look at nothing but load."""

# ruff: noqa: ARG002 - and so not at what is to be placed

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from gateway.pool import Pair
from gateway.routing.policy import Demand, Policy, ordered
from gateway.worker import Worker


class LeastLoad(Policy):
    """The workers with the fewest requests."""

    def order(self, pairs: Sequence[Pair], demand: Demand) -> list[Pair]:
        return ordered(pairs, _load, _load)


class PowerOfTwo(Policy):
    """Of two workers drawn at random the one with fewer requests; behind it the other one, and the rest as drawn.

    For several gateways: what each knows of the others' requests is up to a poll old, and with the least load all of
    them would send the next second's requests to the same worker.
    """

    def __init__(self, draw: random.Random | None = None) -> None:
        self._draw = draw or random.Random()

    def order(self, pairs: Sequence[Pair], demand: Demand) -> list[Pair]:
        prefill = self._ranks([pair.prefill for pair in pairs])
        decode = self._ranks([pair.decode for pair in pairs])
        return ordered(pairs, prefill, decode)

    def _ranks(self, workers: Sequence[Worker]) -> Callable[[Worker], int]:
        drawn = list(dict.fromkeys(workers))
        self._draw.shuffle(drawn)
        drawn.sort(key=lambda worker: worker.avoided)  # none of the two is one that failed lately, where others are
        drawn[:2] = sorted(drawn[:2], key=_load)
        return {worker: rank for rank, worker in enumerate(drawn)}.__getitem__


def _load(worker: Worker) -> int:
    return worker.load
