"""A decode worker's metrics, all read from counters that it keeps anyway."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from branchline.observe.metrics import Family, Sheet, StateCollector, registry_of
from decode_worker.leases import LeaseState
from decode_worker.sessions import Sessions

LEASES = Family("branchline_decode_leases", "gauge", "Leases that live, by state.", ("state",))
LEASES_ENDED = Family("branchline_decode_leases_ended_total", "counter", "Leases that have ended.", ("state",))
QUEUED = Family("branchline_decode_reservations_queued", "gauge", "Reservations that wait for room.")
LIMIT = Family("branchline_decode_batch_limit", "gauge", "The most sequences that decode together.")
BLOCKS = Family("branchline_decode_kv_blocks", "gauge", "KV blocks, by whether a sequence holds them.", ("state",))
CACHED = Family(
    "branchline_decode_kv_blocks_cached", "gauge", "KV blocks, held or free, that a later context can take over."
)
CONTEXT = Family(
    "branchline_decode_context_tokens_total",
    "counter",
    "Tokens of contexts that came: those whose KV was here already, and those whose KV was handed off.",
    ("source",),
)
TOKENS = Family(
    "branchline_decode_tokens_total",
    "counter",
    "Tokens: emitted, drafted, and accepted of the drafted.",
    ("kind",),
)
LENGTH = Family(
    "branchline_decode_acceptance_length",
    "histogram",
    "Tokens that one target forward gave a sequence: those accepted, and one more.",
)
ACCEPTED = Family(
    "branchline_decode_accepted_tokens_total",
    "counter",
    "Accepted tokens by their depth in the draft tree, from 1.",
    ("depth",),
)
PREEMPTIONS = Family(
    "branchline_decode_preemptions_total", "counter", "Leases that gave their blocks to a more important request."
)
COLD_STARTS = Family(
    "branchline_decode_cold_starts_total", "counter", "Sequences that began to decode without the draft head's KV."
)

FAMILIES = (
    LEASES,
    LEASES_ENDED,
    QUEUED,
    LIMIT,
    BLOCKS,
    CACHED,
    CONTEXT,
    TOKENS,
    LENGTH,
    ACCEPTED,
    PREEMPTIONS,
    COLD_STARTS,
)


def decode_registry(sessions: Sessions) -> CollectorRegistry:
    """To be read on the worker's event loop."""

    def read(sheet: Sheet) -> None:
        totals, table, engine = sessions.totals, sessions.table, sessions.engine
        for state in LeaseState:
            if state.ended:
                sheet.put(LEASES_ENDED, table.ended[state], state.value)
            else:
                sheet.put(LEASES, table.count(state), state.value)
        sheet.put(QUEUED, len(sessions.waiting))
        sheet.put(LIMIT, engine.runner.max_batch)
        pool = engine.runner.pool
        used = pool.used  # once: the engine's thread goes on meanwhile
        sheet.put_each(BLOCKS, {"used": used, "free": pool.total - used})
        sheet.put(CACHED, pool.cached)
        sheet.put_each(CONTEXT, {"cached": totals.reused_tokens, "received": totals.received_tokens})
        drafted, accepted = totals.speculation.drafted, totals.speculation.accepted
        sheet.put_each(TOKENS, {"emitted": totals.emitted_tokens, "drafted": drafted, "accepted": accepted})
        counts = [totals.forwards_by_tokens[tokens] for tokens in range(1, engine.tree.depth + 2)]
        sheet.put_histogram(LENGTH, counts, sum(tokens * count for tokens, count in enumerate(counts, 1)))
        for depth in range(1, len(counts)):
            sheet.put(ACCEPTED, sum(counts[depth:]), str(depth))
        sheet.put(PREEMPTIONS, totals.preemptions)
        sheet.put(COLD_STARTS, totals.cold_starts)

    return registry_of("decode", StateCollector(FAMILIES, read))
