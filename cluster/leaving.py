"""How a process leaves: it drains, the gateways drop it, it ends, and nobody brings it back."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from cluster.member import Leaving, Member
from cluster.news import Announcer
from cluster.roster import Roster

#: Seconds without anything to do before a process that drains is done: a request may be under way to it.
IDLE_S = 1.0
#: Seconds that gateways have to hear that a worker is to be dropped.
DROP_S = 2.0
#: Seconds for `serve` to end when nobody needs it any more.
STOP_S = 5.0


def begin(member: Member, grace_s: float) -> None:
    """Nothing new goes there from now on, as soon as the gateways have heard. Said again, it sets a new time."""
    until = time.monotonic() + grace_s
    if member.leaving is not None:
        member.leaving.until = until
        return
    member.leaving = Leaving(until)
    if member.role == "gateway" and member.info is not None:
        member.actor.drain.remote()


def step(roster: Roster, announcer: Announcer, tell: Callable[[str], None]) -> None:
    """One look at all that leave, after a poll."""
    now = time.monotonic()
    for member in list(roster.members):
        if member.leaving is None:
            continue
        if member.leaving.dropped_at is None:
            if reason := _done(member, member.leaving, roster, announcer, now):
                tell(f"{member.name}: {reason}")
                member.leaving.dropped_at = now
        elif member.leaving.stop is None:
            known = announcer.everybody_knows(roster.members)
            if known or now > member.leaving.dropped_at + DROP_S:
                _stop(member, member.leaving, roster, tell, now)
        elif _ended(member.leaving) or now > member.leaving.stop_by:
            _remove(member, roster, tell)


def _done(member: Member, leaving: Leaving, roster: Roster, announcer: Announcer, now: float) -> str:
    """Why it is to be dropped now; empty while it has something to finish."""
    if not member.ready:
        return "ends, it was not ready"
    left = member.load.unfinished if member.load is not None else 0
    if left == 0 and announcer.everybody_knows(roster.members):
        leaving.idle_since = leaving.idle_since or now
        if now - leaving.idle_since >= IDLE_S:
            return "has drained, it ends"
    else:
        leaving.idle_since = None
    if now > leaving.until:
        return f"its time to drain is over; {left} left to finish, elsewhere" if left else "its time to drain is over"
    return ""


def _stop(member: Member, leaving: Leaving, roster: Roster, tell: Callable[[str], None], now: float) -> None:
    if member.info is None:  # no process to be polite to
        _remove(member, roster, tell)
        return
    leaving.stop = member.actor.stop.remote(STOP_S)
    leaving.stop_by = now + STOP_S + 1.0


def _ended(leaving: Leaving) -> bool:
    done, _ = ray.wait([leaving.stop], timeout=0)
    return bool(done)


def _remove(member: Member, roster: Roster, tell: Callable[[str], None]) -> None:
    roster.remove(member)
    tell(f"{member.name}: has ended")
