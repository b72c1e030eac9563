"""Ray's placement groups for the first workers; a worker that comes later takes the place of one that has gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.placement import Claims, Seat


@dataclass(frozen=True)
class Bundle:
    """A place that Ray keeps free for one actor of a role."""

    group: PlacementGroup
    index: int
    role: str
    claims: Claims


class Groups:
    """`placement` is `none`, `spread` or `pack`. The groups are wishes (Ray's SPREAD and PACK, not the strict ones):
    with too few nodes workers start all the same.
    """

    def __init__(self, placement: str) -> None:
        self._placement = placement
        self._groups: list[PlacementGroup] = []
        self._free: list[Bundle] = []
        self._taken: dict[str, Bundle] = {}

    def prepare(self, seats: Sequence[Seat]) -> None:
        """Asks Ray for places for the first seats. They come when the cluster has room."""
        prefill, decode = ([seat for seat in seats if seat.role == role] for role in ("prefill", "decode"))
        if self._placement == "spread":
            self._add("SPREAD", decode)
        elif self._placement == "pack":
            for pair in zip(prefill, decode, strict=False):  # those without a partner are placed by Ray
                self._add("PACK", pair)

    def take(self, seat: Seat) -> Any:
        """Ray's scheduling strategy for an actor: a place for its role that is free and claims the same, else None."""
        bundle = next((free for free in self._free if (free.role, free.claims) == (seat.role, seat.claims)), None)
        if bundle is None:
            return None
        self._free.remove(bundle)
        self._taken[seat.name] = bundle
        return PlacementGroupSchedulingStrategy(bundle.group, placement_group_bundle_index=bundle.index)

    def give_back(self, name: str) -> None:
        """The actor has gone, and its place is for the next one."""
        if bundle := self._taken.pop(name, None):
            self._free.append(bundle)

    def close(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()
        self._free.clear()
        self._taken.clear()

    def _add(self, strategy: str, seats: Sequence[Seat]) -> None:
        claims = [seat.claims for seat in seats]
        group = placement_group(
            [each.resources for each in claims],
            strategy=strategy,
            bundle_label_selector=[dict(each.labels) for each in claims] if any(c.labels for c in claims) else None,
        )
        self._groups.append(group)
        self._free += [Bundle(group, index, seat.role, seat.claims) for index, seat in enumerate(seats)]
