"""What the gateway remembers of a request, enough to go on with it on other workers at the next token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from branchline.core import FinishReason, Request, SamplingParams, SpeculationStats

#: What fits the messages: seven weeks.
LONGEST_MS = 2**32 - 1


@dataclass(slots=True)
class AttemptRecord:
    """One start of a sample on a pair of workers. `failure` says why it ended early, None while it runs or is done."""

    prefill: str
    decode: str
    failure: str | None = None
    #: The decode worker took its blocks back for another request: no failure of anybody's.
    preempted: bool = False
    #: Of the decode worker's lease, as far as its tokens have come.
    speculation: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def failed(self) -> bool:
        return self.failure is not None and not self.preempted


@dataclass(slots=True)
class JournalEntry:
    """One sample of a request with all defaults resolved, and how far it has come.

    `sampling.seed` is fixed here, once: every attempt draws the same noise. The samples of one request differ in
    `request_id` and `sampling.sample_index` only.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    draft_nodes: int | None = None
    priority: int = 0
    #: The client's name for what the request belongs to; for routing only.
    session: str = ""
    #: When the client asked, on the monotonic clock; what it waits counts from then, over all attempts.
    arrived: float = field(default_factory=time.monotonic)
    #: What the client has, or is about to get; of an earlier stream, too.
    emitted: list[int] = field(default_factory=list)
    #: The client has seen its end already, in an earlier stream: nothing is done for it.
    settled: bool = False
    #: Of the prompt's tokens those that the prefill worker did not have to compute for the first output token.
    cached_tokens: int = 0
    attempts: list[AttemptRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._request(())  # holds the invariants of a request

    @property
    def queued_ms(self) -> int:
        """Milliseconds since the client asked, as messages to workers carry them."""
        return min(int((time.monotonic() - self.arrived) * 1000), LONGEST_MS)

    @property
    def context(self) -> tuple[int, ...]:
        """All tokens so far."""
        return (*self.prompt, *self.emitted)

    def next_request(self) -> Request:
        """What the next attempt is to compute: prompt and emitted tokens apart, since penalties need the border."""
        return self._request(tuple(self.emitted))

    def _request(self, emitted: tuple[int, ...]) -> Request:
        return Request(
            request_id=self.request_id,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            emitted=emitted,
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            logprobs=self.logprobs,
            draft_nodes=self.draft_nodes,
        )

    def record(self, token_ids: Sequence[int]) -> None:
        assert len(self.emitted) + len(token_ids) <= self.max_tokens
        self.emitted.extend(token_ids)

    @property
    def ended(self) -> FinishReason | None:
        """Set when the last emitted token ends the request, though the worker died before it could say so."""
        if self.emitted and self.emitted[-1] in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.emitted) >= self.max_tokens else None

    @property
    def speculation(self) -> SpeculationStats:
        """Over all attempts, also those that failed."""
        return sum((attempt.speculation for attempt in self.attempts), SpeculationStats())

    @property
    def failed_attempts(self) -> int:
        return sum(attempt.failed for attempt in self.attempts)

    @property
    def failovers(self) -> int:
        """Failed attempts that another one followed."""
        return sum(attempt.failed for attempt in self.attempts[:-1])

    @property
    def preemptions(self) -> int:
        return sum(attempt.preempted for attempt in self.attempts)

    @property
    def failures(self) -> str:
        """Why each attempt ended early, in one line."""
        failed = [(number, a) for number, a in enumerate(self.attempts, 1) if a.failure is not None]
        return "; ".join(f"attempt {number} ({a.prefill} -> {a.decode}): {a.failure}" for number, a in failed)
