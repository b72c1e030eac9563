"""A rolling change of the workers' configuration: one at a time, and a new one is ready before an old one goes."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cluster import leaving
from cluster.member import Member
from cluster.placement import WORKER_ROLES, Plan
from cluster.roster import Roster

#: What may change while a system serves, by field or by section. All else is part of what clients and gateways
#: know of it, or decides which text comes: that takes another system.
CHANGEABLE = ("model.draft", "model.tree", "engine", "prefill", "decode", "transfer")
#: Of those sections: what two workers have to share, and what `scale` does.
FIXED = ("engine.block_size", "engine.max_model_len", "prefill.replicas", "decode.replicas")

Tell = Callable[[str], None]


class Phase(enum.StrEnum):
    ROLLING = "rolling"
    DONE = "done"
    ROLLING_BACK = "rolling back"
    ROLLED_BACK = "rolled back"
    STUCK = "stuck"


def refused(fields: Iterable[str], others: Iterable[str] = ()) -> str:
    """The first of these fields that can't change while serving; empty when all can. `others`: models besides the main
    one, whose fields are `others.NAME.…`.
    """
    prefixes = [f"others.{name}." for name in others]
    for name in fields:
        own = next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)
        allowed = own in CHANGEABLE or own.partition(".")[0] in CHANGEABLE
        if not allowed or own in FIXED:
            return name
    return ""


@dataclass
class Rollout:
    """Belongs to the supervisor's thread. Ends as DONE, or as ROLLED_BACK with all workers as they were; STUCK when the
    way back failed, too: workers of both kinds serve then.
    """

    #: The plan to go back to.
    before: Plan
    #: Seconds that a worker which is replaced has for its requests.
    grace_s: float
    #: Seconds for a new worker to be ready.
    patience_s: float
    phase: Phase = Phase.ROLLING
    #: Why it went back, or got stuck.
    reason: str = ""
    _newcomer: Member | None = None
    _began: float = 0.0
    _going: list[Member] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.phase not in (Phase.ROLLING, Phase.ROLLING_BACK)

    def detail(self, roster: Roster) -> str:
        """How far it is, in words."""
        workers = [member for role in WORKER_ROLES for member in roster.of(role)]
        fresh = sum(member.seat.revision == roster.plan.revision for member in workers)
        progress = f"{fresh} of {len(workers)} workers have revision {roster.plan.revision}"
        return f"{progress}; {self.reason}" if self.reason else progress

    def step(self, roster: Roster, tell: Tell) -> None:
        """One look, after a poll."""
        if self.over:
            return
        if self._newcomer is not None:
            self._look_at(self._newcomer, roster, tell)
            return
        self._going = [member for member in self._going if member in roster.members]
        if self._going:
            return
        old = self._next(roster)
        if old is None:
            self.phase = Phase.DONE if self.phase is Phase.ROLLING else Phase.ROLLED_BACK
            tell(f"update: {self.phase}, {self.detail(roster)}")
            return
        self._newcomer, self._began = roster.add(old.role, old.seat.model), time.monotonic()
        tell(f"update: {self._newcomer.name} is to take the place of {old.name}")

    def _look_at(self, newcomer: Member, roster: Roster, tell: Tell) -> None:
        if newcomer not in roster.members or newcomer.leaving is not None:  # somebody has drained it
            self._newcomer = None
        elif newcomer.deaths:
            self._give_up(f"{newcomer.name}: {newcomer.error}", roster, tell)
        elif newcomer.ready:
            if problem := _misfit(newcomer, roster):
                self._give_up(problem, roster, tell)
                return
            self._newcomer = None
            if old := self._next(roster, newcomer):
                leaving.begin(old, self.grace_s)
                self._going.append(old)
        elif time.monotonic() > self._began + self.patience_s:
            detail = newcomer.detail(time.monotonic()) or "it is still loading"
            self._give_up(f"{newcomer.name}: not ready after {self.patience_s:g} s: {detail}", roster, tell)

    def _next(self, roster: Roster, newcomer: Member | None = None) -> Member | None:
        """Who is to be replaced, by `newcomer` if there is one: of another revision than is aimed at, those that aren't
        ready first.
        """
        stale = [
            member
            for member in roster.members
            if member.role in WORKER_ROLES
            and member.leaving is None
            and member.seat.revision != roster.plan.revision
            and (newcomer is None or (member.role, member.seat.model) == (newcomer.role, newcomer.seat.model))
        ]
        return min(stale, key=lambda one: (WORKER_ROLES.index(one.role), one.ready, one.seat.index), default=None)

    def _give_up(self, reason: str, roster: Roster, tell: Tell) -> None:
        """Goes back to the plan before; a second failure is where it ends."""
        assert self._newcomer is not None
        leaving.begin(self._newcomer, 0.0)
        self._going.append(self._newcomer)
        self._newcomer = None
        if self.phase is Phase.ROLLING:
            self.phase, self.reason = Phase.ROLLING_BACK, reason
            roster.plan = self.before
        else:
            self.phase, self.reason = Phase.STUCK, f"{self.reason}; on the way back {reason}"
        tell(f"update: {self.phase}: {reason}")


def _misfit(newcomer: Member, roster: Roster) -> str:
    """Why a worker that is ready can't work with those that there are; empty when it can, or when nobody knows."""
    ours = newcomer.load.fingerprint if newcomer.load else None
    for role in WORKER_ROLES:
        for other in roster.staying(role, newcomer.seat.model):
            theirs = other.load.fingerprint if other.load else None
            if ours and theirs and ours.target != theirs.target:
                names = sorted(name for name in ours.target.keys() | theirs.target.keys()
                               if ours.target.get(name) != theirs.target.get(name))  # fmt: skip
                return f"{newcomer.name}: could share no KV with {other.name}: their {', '.join(names)} differ"
    return ""
