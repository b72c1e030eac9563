"""What a worker or a gateway has to do at the moment, as its own process counts it."""

from __future__ import annotations

from dataclasses import dataclass, field

from branchline.core import Fingerprint, SpeculationStats


@dataclass(frozen=True, slots=True)
class Workload:
    """A snapshot of one process."""

    #: Requests that are being computed; of a gateway, those that it serves.
    running: int = 0
    #: Those that wait for room.
    queued: int = 0
    #: Whatever somebody would miss if the process ended now, queued or running: leases, prompts, hand-offs, requests.
    unfinished: int = 0
    #: Blocks of the KV cache; 0 of a gateway.
    blocks_used: int = 0
    blocks_total: int = 0
    #: Tokens prefilled or emitted since the start.
    tokens: int = 0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    #: What the worker can share KV by; None of a gateway.
    fingerprint: Fingerprint | None = None


def nobody(_anything: object) -> None:
    """A hook that isn't used."""
