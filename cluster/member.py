"""One actor as the supervisor sees it."""

from __future__ import annotations

import enum
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from branchline.workload import Workload
from cluster.actors import ActorInfo, News
from cluster.placement import Seat
from cluster.shell import State

#: Seconds without an answer after which a process is called silent.
SILENT_AFTER_S = 3.0
#: Seconds over which tokens are counted for a rate.
RATE_WINDOW_S = 5.0
#: Seconds before a failed actor is started again: doubled each time, up to the second figure.
RESTART_DELAYS_S = (1.0, 30.0)


class Condition(enum.StrEnum):
    """In a word, how a process is."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    SILENT = "silent"
    FAILED = "failed"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass
class Leaving:
    """How far a member is on its way out. Times are on the monotonic clock."""

    #: When its requests have had their time.
    until: float
    #: Since when it has had nothing to do and every gateway has known that it drains.
    idle_since: float | None = None
    #: When the gateways were told to drop it.
    dropped_at: float | None = None
    #: Ray's reference to the end of its `serve`, and when that is waited for no longer.
    stop: Any = None
    stop_by: float = 0.0


class Rate:
    """Tokens a second, over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, now: float, total: int) -> None:
        if self._seen and total < self._seen[-1][1]:  # another process counts from 0
            self._seen.clear()
        self._seen.append((now, total))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_WINDOW_S:
            self._seen.popleft()

    @property
    def per_s(self) -> float:
        if len(self._seen) < 2:
            return 0.0
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first) if last > first else 0.0


@dataclass
class Member:
    """Belongs to the supervisor's thread."""

    seat: Seat
    actor: Any
    state: State | None = None
    #: Of its process; None while Ray has not given it one.
    info: ActorInfo | None = None
    load: Workload | None = None
    address: str = ""
    #: Of a gateway's HTTP API.
    http: str = ""
    #: The request for a status that is under way, and when it was sent.
    pending: Any = None
    asked_at: float = 0.0
    next_line: int = 0
    #: Processes of it that have died or were replaced.
    deaths: int = 0
    #: In a row, without having been ready in between.
    failures: int = 0
    not_before: float = 0.0
    #: What went wrong last, empty since it has been ready.
    error: str = ""
    #: Since when Ray has called it dead for good.
    gone_since: float | None = None
    #: When somebody was told that it waits for a process.
    told_waiting: float = field(default_factory=time.monotonic)
    cores: tuple[int, ...] = ()
    leaving: Leaving | None = None
    #: Of a gateway: the last news that it was sent, and Ray's reference to its having heard.
    told: News | None = None
    heard: Any = None
    rate: Rate = field(default_factory=Rate)

    @property
    def name(self) -> str:
        return self.seat.name

    @property
    def role(self) -> str:
        return self.seat.role

    @property
    def for_model(self) -> str:
        """To be put behind its name: which of several models it serves, empty for the main one."""
        return f" for {self.seat.model}" if self.seat.model else ""

    @property
    def ready(self) -> bool:
        return self.state is State.READY

    @property
    def serving(self) -> bool:
        """Whether requests may be sent there."""
        return self.ready and self.leaving is None

    def condition(self, now: float) -> Condition:
        if self.leaving is not None:
            return Condition.DRAINING if self.leaving.dropped_at is None else Condition.STOPPING
        if self.state is not None and self.info is not None and self.silent_s(now) > SILENT_AFTER_S:
            return Condition.SILENT
        if self.state is State.FAILED or (self.error and now < self.not_before):
            return Condition.FAILED
        if self.info is None:
            return Condition.WAITING
        return Condition.READY if self.ready else Condition.STARTING

    def detail(self, now: float) -> str:
        """More on the condition."""
        match self.condition(now):
            case Condition.SILENT:
                return f"no answer for {self.silent_s(now):.0f} s"
            case Condition.FAILED:
                return f"{self.error}; again in {max(0.0, self.not_before - now):.0f} s"
            case Condition.WAITING:
                claims = ", ".join(f"{amount:g} {name}" for name, amount in self.seat.claims.resources.items())
                labels = "".join(f", a node with {key}={value}" for key, value in self.seat.claims.labels.items())
                return f"for a process: Ray has to find {claims or 'a node'}{labels}"
            case Condition.DRAINING:
                assert self.leaving
                left = max(0.0, self.leaving.until - now)
                return f"{self.load.unfinished if self.load else 0} left to finish within {left:.0f} s"
        return self.error

    def silent_s(self, now: float) -> float:
        """Seconds that an answer has been due."""
        return now - self.asked_at if self.pending is not None else 0.0

    def note_death(self, error: str) -> None:
        """Its process has gone; Ray brings up another, which will be idle."""
        now = time.monotonic()
        first, longest = RESTART_DELAYS_S
        delay = 0.0 if self.failures == 0 else min(longest, first * 2 ** (self.failures - 1))
        self.deaths += 1
        self.failures += 1
        self.not_before = now + delay
        self.told_waiting = now
        self.error = error
        self.forget_process()

    def forget_process(self) -> None:
        """What is known of its process is over."""
        self.state, self.next_line = State.IDLE, 0
        self.info, self.load, self.told, self.heard = None, None, None, None
