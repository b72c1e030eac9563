"""Samples that are placed together: same prompt, same tokens so far, one hand-off for all."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.placement import Search
from gateway.sample import Sample


class Group:
    """Neighbouring samples of a request that have emitted nothing yet, or one alone that may have."""

    def __init__(self, samples: Sequence[Sample], misfits: dict[tuple[str, ...], str], until: float) -> None:
        """`misfits` is kept up to date by the searches; `until` is the deadline on the monotonic clock."""
        self.samples = tuple(samples)
        self._misfits = misfits
        self._until = until
        self._attempts = 0

    @property
    def indices(self) -> set[int]:
        return {sample.index for sample in self.samples}

    @property
    def request_id(self) -> str:
        """Differs from that of any other group of the request: a decode worker ends the leases that earlier attempts
        under the same id have left.
        """
        first, last = self.samples[0], self.samples[-1]
        return first.entry.request_id + (f"-{last.index}" if last is not first else "")

    @property
    def can_stay_together(self) -> bool:
        return len(self.samples) == 1 or not any(sample.entry.emitted for sample in self.samples)

    def next_search(self) -> Search:
        """For the next attempt."""
        self._attempts += 1
        entry = self.samples[0].entry
        return Search(
            request_id=self.request_id,
            request=entry.next_request(),
            arrived=entry.arrived,
            until=self._until,
            priority=entry.priority,
            samples=len(self.samples),
            attempt=self._attempts,
            session=entry.session,
            misfits=self._misfits,
        )
