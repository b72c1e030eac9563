"""The gateway's metrics: what clients wait for, how much is asked of it, and which workers it sees."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from prometheus_client import CollectorRegistry, Histogram

from branchline.observe.metrics import REQUEST_S, TOKEN_S, Family, Sheet, StateCollector, histogram, registry_of
from gateway.door import Door
from gateway.worker import Role

if TYPE_CHECKING:
    from gateway.model import Model

REQUESTS = Family(
    "branchline_gateway_requests_total",
    "counter",
    "Calls that generate, refused and malformed ones too, by how they ended: the gRPC status, over HTTP too.",
    ("interface", "code"),
)
RUNNING = Family("branchline_gateway_requests_running", "gauge", "Requests that are let in, one for each prompt.")
LIMIT = Family("branchline_gateway_requests_limit", "gauge", "The most requests that are let in at once.")
QUEUED = Family("branchline_gateway_requests_queued", "gauge", "Requests that wait for room at a decode worker.")
TOKENS = Family(
    "branchline_gateway_tokens_total",
    "counter",
    "Tokens of requests: of prompts, those of them that were cached, generated, drafted, and accepted of the drafted.",
    ("kind",),
)
FAILOVERS = Family(
    "branchline_gateway_failovers_total", "counter", "Times that a sample went on elsewhere after a failure."
)
PREEMPTIONS = Family(
    "branchline_gateway_preemptions_total", "counter", "Times that a sample's blocks went to a more important request."
)
WORKERS = Family(
    "branchline_gateway_workers",
    "gauge",
    "Workers known, by role, by whether they answer, and by the model that they have.",
    ("role", "state", "model"),
)
QUEUE_S = Family(
    "branchline_gateway_queue_seconds", "histogram", "From a request's arrival until it has a pair of workers."
)
TTFT_S = Family(
    "branchline_gateway_time_to_first_token_seconds", "histogram", "From a request's arrival to a sample's first token."
)
ITL_S = Family(
    "branchline_gateway_inter_token_seconds",
    "histogram",
    "Between two messages of a sample that bring tokens, one or several.",
)
TPOT_S = Family(
    "branchline_gateway_time_per_output_token_seconds",
    "histogram",
    "Of finished samples: from the first token to the last, by the number of tokens behind the first.",
)
REQUEST_DURATION_S = Family(
    "branchline_gateway_request_seconds", "histogram", "From a call's arrival to its end, however it ended."
)

FAMILIES = (REQUESTS, RUNNING, LIMIT, QUEUED, TOKENS, FAILOVERS, PREEMPTIONS, WORKERS)
HISTOGRAMS = {
    QUEUE_S: REQUEST_S,
    TTFT_S: REQUEST_S,
    ITL_S: TOKEN_S,
    TPOT_S: TOKEN_S,
    REQUEST_DURATION_S: REQUEST_S,
}
TOKEN_KINDS = ("prompt", "cached", "generated", "drafted", "accepted")


@dataclass
class Counts:
    """What can only be counted as it happens. Belongs to one event loop."""

    #: By interface and code.
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: By kind.
    tokens: Counter[str] = field(default_factory=Counter)
    failovers: int = 0
    preemptions: int = 0
    histograms: dict[Family, Histogram] = field(
        default_factory=lambda: {family: histogram(family, bounds) for family, bounds in HISTOGRAMS.items()}
    )

    def ended(self, interface: str, code: grpc.StatusCode) -> None:
        """A call that generates, or was refused before it could."""
        self.requests[interface, code.name] += 1

    def observe(self, family: Family, value: float) -> None:
        self.histograms[family].observe(value)


def gateway_registry(models: Sequence[Model], door: Door, counts: Counts) -> CollectorRegistry:
    """To be read on the gateway's event loop. `models` may grow."""

    def read(sheet: Sheet) -> None:
        for (interface, code), count in counts.requests.items():
            sheet.put(REQUESTS, count, interface, code)
        sheet.put(RUNNING, door.active_requests)
        sheet.put(LIMIT, door.max_requests)
        sheet.put(QUEUED, sum(model.backend.placer.waiting for model in models))
        sheet.put_each(TOKENS, {kind: counts.tokens[kind] for kind in TOKEN_KINDS})
        sheet.put(FAILOVERS, counts.failovers)
        sheet.put(PREEMPTIONS, counts.preemptions)
        for model, role in itertools.product(models, Role):
            for state, healthy in (("up", True), ("down", False)):
                workers = [w for w in model.backend.pool.workers if w.role is role and w.healthy is healthy]
                sheet.put(WORKERS, len(workers), role, state, model.label)

    return registry_of("gateway", StateCollector(FAMILIES, read, counts.histograms))
