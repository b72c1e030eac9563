"""How an attempt at a sample ends."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from branchline.core import FinishReason
from gateway.worker import Worker


@dataclass(frozen=True, slots=True)
class Completed:
    """The sample has all of its tokens. `lease_done`: the decode worker has said so itself."""

    reason: FinishReason
    lease_done: bool = False


class Cause(enum.Enum):
    """Why an attempt gives no more tokens though the sample is not complete."""

    FAILED = enum.auto()
    MISFIT = enum.auto()  # the two workers refused each other
    BUSY = enum.auto()  # the prefill worker had no room: nothing is wrong, and the attempt does not count
    PREEMPTED = enum.auto()  # the decode worker took its blocks back for another request: nothing is wrong, either


class AttemptEndedError(Exception):
    """This attempt will give no more tokens; another may. `suspects` are the workers that may be to blame."""

    def __init__(self, reason: str, *suspects: Worker, cause: Cause = Cause.FAILED) -> None:
        super().__init__(reason)
        self.suspects = suspects
        self.cause = cause


Outcome = Completed | AttemptEndedError
