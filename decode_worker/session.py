"""What hangs on a lease while it lives: its token stream, its share of the hand-off, its counters."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field

from branchline.core import FinishReason, Request, SpeculationStats, TokenLogprobs
from branchline.observe.logs import about
from decode_worker.arrived import Arrived
from decode_worker.flow import HandoffFlow
from decode_worker.leases import Lease

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of one step; `index` is the output index of the first, `speculation` the lease's up to here."""

    index: int
    token_ids: tuple[int, ...]
    speculation: SpeculationStats
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Preempted:
    """The blocks went to a request that comes first; `reason` is for those who meet the lease later."""

    reason: str


@dataclass(frozen=True, slots=True)
class Aborted:
    reason: str


#: The last event of a token stream.
Ending = Finish | Preempted | Aborted


@dataclass(eq=False)
class SampleGroup:
    """The samples of one reservation: one hand-off serves them all."""

    arrived: Arrived
    #: What the reservation said that they share; empty when it didn't.
    context: tuple[int, ...] = field(default=(), repr=False)
    #: By sample, those that have ended included.
    members: list[Session] = field(default_factory=list)
    #: What the streams of the hand-off, which is sample 0's, share.
    flow: HandoffFlow = field(default_factory=HandoffFlow)
    #: The hand-off has arrived whole; from now on each sample goes its own way.
    complete: bool = False

    @property
    def live(self) -> list[Session]:
        return [member for member in self.members if not member.lease.state.ended]


@dataclass(eq=False)
class Session:
    """A lease and everything that hangs on it."""

    lease: Lease
    group: SampleGroup
    sample: int = 0
    #: For the token stream. Holds at most max_tokens tokens, so it needs no bound of its own.
    events: asyncio.Queue[TokenBatch | Ending] = field(default_factory=asyncio.Queue)
    request: Request | None = None
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    next_output: int = 0

    def log(self, event: str, facts: str) -> None:
        lease = self.lease
        logger.info("lease=%s event=%s %s", lease.lease_id, event, facts, extra=about(lease.request_id))


@dataclass
class Totals:
    """Since the start, over all requests."""

    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    emitted_tokens: int = 0
    cold_starts: int = 0
    preemptions: int = 0
    #: Tokens whose KV was here already when their hand-off came.
    reused_tokens: int = 0
    #: And tokens whose KV came.
    received_tokens: int = 0
    #: Target forwards of one sequence, by the tokens that they gave.
    forwards_by_tokens: Counter[int] = field(default_factory=Counter)
