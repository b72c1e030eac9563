"""An attempt at its two workers, from its placement to its end: what it counts for there, and what it teaches."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from gateway.leases import Placement
from gateway.routing.policy import Policy


class Stay:
    """A block in which the attempt runs. The prefill worker is done with it sooner than the decode worker, and then it
    is no load there any more."""

    def __init__(self, placement: Placement, policy: Policy) -> None:
        self._placement = placement
        self._policy = policy
        self._samples = len(placement.lease_ids)
        self._waiting_tokens = placement.forecast.computed
        self._prefilling = True

    def __enter__(self) -> Self:
        pair = self._placement.pair
        pair.prefill.in_flight += 1
        pair.prefill.waiting_tokens += self._waiting_tokens
        pair.decode.in_flight += self._samples
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave_prefill()
        self._placement.pair.decode.in_flight -= self._samples

    def computed(self, cached_tokens: int) -> None:
        """The prefill worker has the first token. What comes later than the first call does nothing."""
        if self._waiting_tokens:
            self._wait_no_more()
            self._policy.computed(self._placement.pair.prefill, self._placement.forecast, cached_tokens)

    def handed_off(self, context: tuple[int, ...]) -> None:
        """The decode worker has the context: the prefill worker is done."""
        self._leave_prefill()
        self._policy.has(self._placement.pair.decode, context)

    def ended(self, context: tuple[int, ...]) -> None:
        """A sample is through with the decode worker, which is well: it has all but the last token in its cache."""
        self._policy.has(self._placement.pair.decode, context[:-1])

    def _leave_prefill(self) -> None:
        self._wait_no_more()
        if self._prefilling:
            self._prefilling = False
            self._placement.pair.prefill.in_flight -= 1

    def _wait_no_more(self) -> None:
        self._placement.pair.prefill.waiting_tokens -= self._waiting_tokens
        self._waiting_tokens = 0
