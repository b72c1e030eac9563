"""The actors of a system that there are: created, found, removed, with their cores and places."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping

import ray

from branchline.config import Config
from cluster.actors import create_actor
from cluster.cores import Cores
from cluster.groups import Groups
from cluster.member import Member
from cluster.placement import ROLES, Plan, Seat


class Roster:
    """Belongs to the supervisor's thread. `env`: variables for the actors' processes."""

    def __init__(self, plan: Plan, env: Mapping[str, str]) -> None:
        self.plan = plan
        self.members: list[Member] = []
        self.cores = Cores()
        self._env = env
        self._groups = Groups(plan.config.ray.placement)
        self._numbers: Counter[str] = Counter()

    def fill(self) -> None:
        """Creates the first actors, all idle."""
        seats = self.plan.first()
        self._groups.prepare(seats)
        for seat in seats:
            self._join(seat)
            self._numbers[seat.role] += 1

    def add(self, role: str, model: str = "") -> Member:
        """Creates one more, idle."""
        used = {member.seat.slot for member in self.of(role) if member.seat.model == model}
        slot = next(number for number in range(len(used) + 1) if number not in used)
        seat = self.plan.seat(role, self._numbers[role], slot, model)
        self._numbers[role] += 1
        return self._join(seat)

    def of(self, role: str) -> list[Member]:
        return [member for member in self.members if member.role == role]

    def staying(self, role: str, model: str) -> list[Member]:
        """Those of a role, for a model, that are not on their way out."""
        return [member for member in self.of(role) if member.leaving is None and member.seat.model == model]

    def find(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def remove(self, member: Member) -> None:
        """Ends its process by force, for good, if it has one still."""
        self.members.remove(member)
        self._end(member)
        self._groups.give_back(member.name)

    def renew(self, member: Member) -> None:
        """Puts another actor in the place of one that Ray will not bring back."""
        self._end(member)
        self._groups.give_back(member.name)
        member.actor = create_actor(member.seat, self._env, self._groups.take(member.seat))
        member.pending = member.gone_since = None

    def assign(self, member: Member) -> Config:
        """Gives it cores on the node where its process is; returns the configuration to serve with."""
        assert member.info
        seat, info = member.seat, member.info
        member.cores = self.cores.take(member.name, info.node_id, info.cores, seat.share, seat.cores)
        if member.cores and member.cores != seat.cores:
            return seat.config.override(**{"engine.threads": self.plan.threads(seat, len(member.cores))})
        if seat.role == "gateway" or self.plan.local:
            return seat.config
        # Its node may have fewer cores than it claims CPUs.
        return seat.config.override(**{"engine.threads": max(1, min(seat.config.engine.threads, len(info.cores)))})

    def clear(self) -> None:
        for member in list(self.members):
            self.remove(member)
        self._groups.close()

    def _join(self, seat: Seat) -> Member:
        member = Member(seat, create_actor(seat, self._env, self._groups.take(seat)))
        self.members.append(member)
        self.members.sort(key=lambda member: (ROLES.index(member.role), member.seat.index))
        return member

    def _end(self, member: Member) -> None:
        self.cores.give_back(member.name)
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it has gone already
            ray.kill(member.actor, no_restart=True)
