"""What a step of the decode batch brings, and what of it is under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from branchline.core import FinishReason, TokenLogprobs
from branchline.engine.allocation import Allocation
from branchline.engine.flight import Landing


@dataclass(frozen=True)
class StepResult:
    """What one iteration did for one request. `drafted` counts the draft nodes that it verified; `logprobs` are as many
    as `token_ids` if the request asked for them, else none."""

    allocation: Allocation
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    drafted: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Step:
    """`preempted` are the allocations that were released for want of blocks; their requests may start again later."""

    results: list[StepResult] = field(default_factory=list)
    preempted: list[Allocation] = field(default_factory=list)


@dataclass(frozen=True)
class Flight:
    """A launched iteration of a batch bucket and a budget: each row's allocation, with the draft nodes that it
    verifies."""

    bucket: int
    nodes: int
    rows: list[tuple[Allocation, int]]
    landing: Landing
