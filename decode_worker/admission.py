"""Who gets blocks next: the reservations that wait, in one order. Pure book-keeping, driven by `engine_loop`.

A rank is a virtual arrival time: when the client asked, moved ahead by `PRIORITY_S` for each level of priority. It
never changes, not by waiting and not by a preemption. The smallest rank is served first, and a small request never
overtakes a large one that came before; so everything gets its turn once what stands before it has had it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from branchline.core import rank_of as rank_of


@dataclass(frozen=True, slots=True)
class Reservation:
    """What is to be reserved. The samples of a request get their blocks together or not at all."""

    #: Of samples 0, 1, …
    lease_ids: tuple[str, ...]
    context_length: int
    max_length: int
    rank: float
    priority: int = 0
    #: Of the context's whole blocks, see engine.prefix_cache; None when it neither finds nor leaves any.
    keys: tuple[bytes, ...] | None = None


class AdmissionQueue:
    """Reservations by rank; among equal ranks, first come first served."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Reservation]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def head(self) -> Reservation | None:
        return self._waiting[0][2] if self._waiting else None

    def add(self, reservation: Reservation) -> None:
        bisect.insort(self._waiting, (reservation.rank, next(self._numbers), reservation))

    def pop(self) -> Reservation:
        """Takes the head off."""
        return self._waiting.pop(0)[2]

    def withdraw(self, reservation: Reservation) -> bool:
        """False when it doesn't wait here any more."""
        for place, (_, _, waiting) in enumerate(self._waiting):
            if waiting is reservation:
                del self._waiting[place]
                return True
        return False

    def clear(self) -> None:
        self._waiting.clear()


class Ranked(Protocol):
    """What holds blocks now."""

    @property
    def rank(self) -> float: ...
    @property
    def priority(self) -> int: ...


H = TypeVar("H", bound=Ranked)


def victims(
    head: Reservation,
    holders: Iterable[H],
    unit: Callable[[H], Collection[H]],
    fits_without: Callable[[Collection[H]], bool],
) -> list[H]:
    """The fewest holders, worst rank first, without which `head` fits; none when giving them all up isn't enough.

    Only holders of strictly lower priority and of a larger rank count: an old request may be behind in priority, but
    its turn has come, and nothing may take it back. `unit` names those that can only go together.
    """
    lesser = [holder for holder in holders if holder.priority < head.priority and holder.rank > head.rank]
    if not lesser or not fits_without(lesser):
        return []
    chosen: list[H] = []
    for holder in sorted(lesser, key=lambda one: one.rank, reverse=True):
        if holder not in chosen:
            chosen += unit(holder)
            if fits_without(chosen):
                break
    return chosen
