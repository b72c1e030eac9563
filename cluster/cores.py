"""Which cores of which node belong to which worker, so that workers on one node don't stall each other."""

from __future__ import annotations

from collections.abc import Sequence

from branchline.config import CORES_TO_SHARE_OUT


class Cores:
    """Given out per node, each core once. Of one system: others on the same nodes are not known here."""

    def __init__(self) -> None:
        #: By the worker's name: its node's id, and its cores.
        self._given: dict[str, tuple[str, tuple[int, ...]]] = {}

    def take(
        self, name: str, node: str, present: Sequence[int], share: int, planned: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        """Cores of its own for a worker on a node whose processes may use those `present`: the planned ones, or as many
        as its share, else none. What it had before is given back.
        """
        self.give_back(name)
        taken = {core for there, cores in self._given.values() if there == node for core in cores}
        free = [core for core in present if core not in taken]
        if planned and taken.isdisjoint(planned):
            given = planned
        elif share > 0 and len(present) >= CORES_TO_SHARE_OUT and len(free) >= share:
            given = tuple(free[:share])
        else:
            return ()
        self._given[name] = node, given
        return given

    def give_back(self, name: str) -> None:
        self._given.pop(name, None)

    @property
    def given(self) -> int:
        """Cores that are given out, of all nodes."""
        return sum(len(cores) for _, cores in self._given.values())
