"""What is told of a request while it runs: its span, and what the gateway's metrics count of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from branchline.core import FinishReason, SpeculationStats
from branchline.observe.tracing import Metadata, Span, Tracer, Value, trace_context
from gateway.door import Call, Visit
from gateway.journal import AttemptRecord, JournalEntry
from gateway.leases import Placement
from gateway.metrics import ITL_S, QUEUE_S, REQUEST_DURATION_S, TPOT_S, TTFT_S, Counts


class SampleWatch:
    """Of one sample, over all of its attempts."""

    def __init__(self, request: RequestWatch, entry: JournalEntry) -> None:
        self.request = request
        self._entry = entry
        self._counts = request.counts
        self._first_at = 0.0
        self._last_at = 0.0
        #: Of this stream: a resumed one goes on behind others.
        self._tokens = 0

    def tokens(self, count: int) -> None:
        """So many new ones came in one message and are in the journal."""
        now, entry, counts = time.monotonic(), self._entry, self._counts
        if self._first_at:
            counts.observe(ITL_S, now - self._last_at)
        else:
            self._first_at = now
            counts.observe(TTFT_S, now - entry.arrived)
            if entry.sampling.sample_index == 0:  # the others share the prompt
                counts.tokens["prompt"] += len(entry.prompt)
                counts.tokens["cached"] += entry.cached_tokens
            self.request.span.event("first token", {"branchline.sample": entry.sampling.sample_index})
        self._last_at = now
        self._tokens += count
        counts.tokens["generated"] += count

    def speculated(self, before: SpeculationStats, now: SpeculationStats) -> None:
        """Of one lease."""
        self._counts.tokens["drafted"] += now.drafted - before.drafted
        self._counts.tokens["accepted"] += now.accepted - before.accepted

    def broke(self, record: AttemptRecord) -> None:
        """An attempt has ended early, and the sample goes on."""
        if record.preempted:
            self._counts.preemptions += 1
        else:
            self._counts.failovers += 1
        facts: dict[str, Value] = {"branchline.sample": self._entry.sampling.sample_index}
        facts["branchline.prefill_address"], facts["branchline.decode_address"] = record.prefill, record.decode
        self.request.span.event("preempted" if record.preempted else "failed over", facts)

    def finished(self, reason: FinishReason) -> None:
        behind = self._tokens - 1
        if behind > 0:
            self._counts.observe(TPOT_S, (self._last_at - self._first_at) / behind)
        self.request.note_finished(self._entry, reason)


class RequestWatch:
    """Of one call that generates."""

    def __init__(self, span: Span, counts: Counts) -> None:
        self.span = span
        self.counts = counts
        self._finish_reasons: list[str] = []
        self._output_tokens = 0

    @property
    def metadata(self) -> Metadata:
        """For calls to workers."""
        return self.span.metadata

    def admitted(self, visit: Visit, model: str) -> None:
        self.span.set({"gen_ai.response.id": visit.request_id, "gen_ai.response.model": model})

    def read(self, entries: Sequence[JournalEntry]) -> None:
        """All samples of all prompts; none has waited for a worker yet."""
        first = entries[0]
        attributes: dict[str, Value] = {
            "gen_ai.usage.input_tokens": sum(len(e.prompt) for e in entries if e.sampling.sample_index == 0),
            "gen_ai.request.choice.count": max(e.sampling.sample_index for e in entries) + 1,
            "gen_ai.request.max_tokens": first.max_tokens,
            "gen_ai.request.temperature": first.sampling.temperature,
            "gen_ai.request.top_p": first.sampling.top_p,
            "gen_ai.request.top_k": first.sampling.top_k,
            "gen_ai.request.seed": first.sampling.seed,
            "branchline.priority": first.priority,
        }
        self.span.set(attributes)
        self.span.event("queued")

    def sample(self, entry: JournalEntry) -> SampleWatch:
        return SampleWatch(self, entry)

    def placed(self, entry: JournalEntry, placement: Placement) -> None:
        """Samples that begin with `entry` have leases."""
        if not entry.attempts:
            self.counts.observe(QUEUE_S, time.monotonic() - entry.arrived)
        self.span.event(
            "placed",
            {
                "branchline.prefill_address": placement.pair.prefill.address,
                "branchline.decode_address": placement.pair.decode.address,
                "branchline.leases": placement.lease_ids,
            },
        )

    def note_finished(self, entry: JournalEntry, reason: FinishReason) -> None:
        self._finish_reasons.append(reason)
        self._output_tokens += len(entry.emitted)
        self.span.event("completion", {"branchline.sample": entry.sampling.sample_index})
        self.span.set(
            {
                "gen_ai.response.finish_reasons": tuple(self._finish_reasons),
                "gen_ai.usage.output_tokens": self._output_tokens,
            }
        )


class Watch:
    """Of the gateway. Belongs to one event loop."""

    def __init__(self, tracer: Tracer, counts: Counts) -> None:
        self.counts = counts
        self._tracer = tracer

    @contextlib.contextmanager
    def request(self, call: Call) -> Iterator[RequestWatch]:
        """From a call's arrival to its end, which is that of the block."""
        began = time.monotonic()
        operation = "chat" if "chat" in call.method.lower() else "text_completion"
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "branchline",
            "branchline.interface": call.interface,
        }
        try:
            with self._tracer.span(operation, trace_context(call.headers.items()), attributes) as span:
                yield RequestWatch(span, self.counts)
        finally:
            self.counts.observe(REQUEST_DURATION_S, time.monotonic() - began)
