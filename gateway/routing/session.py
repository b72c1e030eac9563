"""A session's requests go to the same workers, whatever is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence

from gateway.pool import Pair
from gateway.routing.policy import Demand, Policy, ordered, share_limit
from gateway.worker import Worker


class SessionAffinity(Policy):
    """By rendezvous hashing: each worker draws a number for the session, and the largest has it. So all gateways agree
    without a word, a worker that goes takes its own sessions with it and no others, and one that comes takes its share.

    A worker with much more than its share of the requests comes behind the session's next ones, which are always the
    same, too; of those the least loaded is first. Requests without a session go to the least load.
    """

    def order(self, pairs: Sequence[Pair], demand: Demand) -> list[Pair]:
        prefill = _rank({pair.prefill for pair in pairs}, demand)
        decode = _rank({pair.decode for pair in pairs}, demand)
        return ordered(pairs, prefill, decode)


def _rank(workers: Collection[Worker], demand: Demand) -> Callable[[Worker], tuple[bool, int]]:
    limit = share_limit(workers, demand.samples)

    def rank(worker: Worker) -> tuple[bool, int]:
        crowded = worker.load + demand.samples > limit
        if crowded or not demand.session:
            return bool(demand.session), worker.load
        return False, -_number(demand.session, worker)

    return rank


def _number(session: str, worker: Worker) -> int:
    """Equal in every process, which Python's own hash of a text is not."""
    text = f"{worker.role} {worker.address} {session}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
