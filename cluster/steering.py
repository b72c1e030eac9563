"""What an operator may have the supervisor do. Call it in the supervisor's thread (`Supervisor.orders`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from branchline.config import ConfigError
from cluster import leaving
from cluster.orders import RefusedError, UnknownError
from cluster.placement import ROLES
from cluster.rollout import CHANGEABLE, FIXED, Rollout, refused
from cluster.supervisor import Supervisor


def scale(
    supervisor: Supervisor, counts: Mapping[str, int], grace_s: float, model: str = ""
) -> tuple[list[str], list[str]]:
    """Adds or drains until each role has that many for `model`, as `Config.each` names it; the names of those added,
    and of those that drain.

    Those that are not ready go first, then those with the least to do, the youngest of several. Raises
    RefusedError.
    """
    _require_serving(supervisor)
    roster = supervisor.roster
    if model not in (known := roster.plan.config.each()):
        raise UnknownError(
            f"{model}: no such model among the others, which are {', '.join(filter(None, known)) or 'none'}"
        )
    if model and "gateway" in counts:
        raise RefusedError("gateway: they serve all models; scale them without naming one")
    for role, count in counts.items():
        if role not in ROLES:
            raise UnknownError(f"{role}: no such role, there are {', '.join(ROLES)}")
        if count < 1:
            raise RefusedError(f"{role}: must be at least 1, got {count}")
    added, draining = [], []
    for role, count in counts.items():
        staying = roster.staying(role, model)
        added += [roster.add(role, model).name for _ in range(count - len(staying))]
        staying.sort(key=lambda m: (m.ready, m.load.unfinished if m.load else 0, -m.seat.index))
        for member in staying[: max(0, len(staying) - count)]:
            leaving.begin(member, grace_s)
            draining.append(member.name)
    supervisor.tell(f"scaling: {', '.join(added) or 'none'} added, {', '.join(draining) or 'none'} to drain")
    return added, draining


def drain(supervisor: Supervisor, name: str, grace_s: float) -> None:
    """Ends one, for good, when it has finished what it has, or after `grace_s` seconds. Raises RefusedError."""
    _require_serving(supervisor)
    roster = supervisor.roster
    member = roster.find(name)
    if member is None:
        raise UnknownError(f"{name}: there is none of that name; there are {', '.join(m.name for m in roster.members)}")
    others = [other for other in roster.staying(member.role, member.seat.model) if other is not member and other.ready]
    if member.ready and not others:
        raise RefusedError(f"{name}: it is the only {member.role} that is ready{member.for_model}; scale up first")
    leaving.begin(member, grace_s)
    supervisor.tell(f"{name}: drains, {grace_s:g} s at most")


def update(supervisor: Supervisor, changes: Mapping[str, Any], grace_s: float) -> int:
    """Begins to replace the workers by ones with another configuration; the number of its revision. `changes`: values
    by the fields' paths; none of them is a rolling restart. Raises RefusedError.
    """
    _require_serving(supervisor)
    roster = supervisor.roster
    if supervisor.rollout is not None and not supervisor.rollout.over:
        raise RefusedError("an update is under way; `branchline status` shows how far it is")
    if name := refused(changes, roster.plan.config.others):
        raise RefusedError(f"{name}: can't change while the system serves; only {', '.join(CHANGEABLE)} can,"
                           f" without {', '.join(FIXED)}")  # fmt: skip
    try:
        plan = roster.plan.changed(roster.plan.config.override(**changes))
        plan.check()
    except ConfigError as error:
        raise RefusedError(str(error)) from None
    supervisor.rollout = Rollout(roster.plan, grace_s, plan.config.ray.start_timeout_s)
    supervisor.tell(f"update to revision {plan.revision}: {', '.join(changes) or 'nothing changes, workers restart'}")
    roster.plan = plan
    return plan.revision


def finish(supervisor: Supervisor, grace_s: float) -> None:
    """Gateways let nobody in any more; returns when they have no request left, or after `grace_s` seconds."""
    deadline = time.monotonic() + grace_s
    gateways = [gateway for gateway in supervisor.roster.of("gateway") if gateway.ready]
    for gateway in gateways:
        gateway.actor.drain.remote()
    while True:
        supervisor.poll()
        supervisor.orders.carry_out()
        left = sum(gateway.load.unfinished for gateway in gateways if gateway.load is not None)
        if not left:
            return
        if time.monotonic() >= deadline:
            supervisor.tell(f"{left} requests are left after {grace_s:g} s and are cut off")
            return


def _require_serving(supervisor: Supervisor) -> None:
    if supervisor.phase != "serving":
        raise RefusedError(f"the system is {supervisor.phase}")
