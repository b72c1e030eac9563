"""A prefill worker's metrics: what it computes, and what its hand-offs cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram

from branchline.observe.metrics import TOKEN_S, Family, Sheet, StateCollector, histogram, registry_of
from prefill_worker.engine_loop import PrefillLoop

REQUESTS = Family("branchline_prefill_requests", "gauge", "Requests here: queued, computed or handed off.")
TOKENS = Family(
    "branchline_prefill_tokens_total",
    "counter",
    "Tokens of contexts: computed, and found in the prefix cache instead.",
    ("source",),
)
BLOCKS = Family("branchline_prefill_kv_blocks", "gauge", "KV blocks, by whether a request holds them.", ("state",))
CACHED = Family(
    "branchline_prefill_kv_blocks_cached", "gauge", "KV blocks, held or free, that a later prompt can take over."
)
RUNNING = Family("branchline_prefill_handoffs_running", "gauge", "Hand-offs under way, or waiting for the computation.")
HANDOFFS = Family(
    "branchline_prefill_handoffs_total",
    "counter",
    "Hand-offs: complete; failed; or not needed any more, since the first token was the last or the request went away.",
    ("outcome",),
)
BYTES = Family("branchline_prefill_handoff_bytes_total", "counter", "Bytes of KV in complete hand-offs.")
RETRIES = Family(
    "branchline_prefill_handoff_retries_total", "counter", "Streams of hand-offs that broke and were opened again."
)
SECONDS = Family(
    "branchline_prefill_handoff_seconds",
    "histogram",
    "Of complete hand-offs: from the first token until the decode worker has everything.",
)
FAMILIES = (REQUESTS, TOKENS, BLOCKS, CACHED, RUNNING, HANDOFFS, BYTES, RETRIES)
OUTCOMES = ("complete", "failed", "cancelled")


@dataclass
class HandoffCounts:
    """Since the start. Belongs to one event loop."""

    #: By outcome.
    ended: Counter[str] = field(default_factory=Counter)
    kv_bytes: int = 0
    retries: int = 0
    seconds: Histogram = field(default_factory=lambda: histogram(SECONDS, TOKEN_S))


def prefill_registry(
    engine: PrefillLoop, counts: HandoffCounts, requests: Callable[[], int], handoffs: Callable[[], int]
) -> CollectorRegistry:
    """To be read on the worker's event loop. `requests` and `handoffs` are those that run now."""

    def read(sheet: Sheet) -> None:
        sheet.put(REQUESTS, requests())
        sheet.put_each(TOKENS, {"computed": engine.prefilled_tokens, "cached": engine.cached_tokens})
        pool = engine.runner.pool
        used = pool.used  # once: the engine's thread goes on meanwhile
        sheet.put_each(BLOCKS, {"used": used, "free": pool.total - used})
        sheet.put(CACHED, pool.cached)
        sheet.put(RUNNING, handoffs())
        sheet.put_each(HANDOFFS, {outcome: counts.ended[outcome] for outcome in OUTCOMES})
        sheet.put(BYTES, counts.kv_bytes)
        sheet.put(RETRIES, counts.retries)

    return registry_of("prefill", StateCollector(FAMILIES, read, {SECONDS: counts.seconds}))
