"""Finding a pair of workers for an attempt, and a lease on the decode worker's blocks."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from branchline.core import PRIORITY_S, InvalidRequestError, Request
from branchline.observe.logs import about
from branchline.v1 import decode_pb2
from branchline.wire import convert
from branchline.wire.status import RpcFailure
from gateway.journal import LONGEST_MS
from gateway.leases import Leases, Placement
from gateway.pool import Pair, WorkerPool
from gateway.routing.policy import Demand, Policy
from gateway.turns import Turns
from gateway.worker import Worker

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.02
_LONGEST_BACKOFF_S = 0.5
#: Seconds that the first in the queue waits in one call for room at the first decode worker; less when there are
#: others, since room may come there.
_WAIT_S = 1.0
_WAIT_BESIDE_OTHERS_S = 0.25
#: Seconds that samples wait for room for all of them when it is their turn; then they go on in smaller groups.
_TOGETHER_S = 1.0


class NoRoomTogetherError(Exception):
    """No decode worker has, or could ever have, room for all samples at once; one by one they may find some."""


@dataclass(slots=True)
class Search:
    """What is to be placed, and what was learned about the workers.

    `request` stands for its samples: their prompts and limits are the same. `until`: the deadline, on the monotonic
    clock.
    """

    request_id: str
    request: Request
    arrived: float
    until: float
    priority: int = 0
    samples: int = 1
    attempt: int = 0
    #: The client's name for its session, "" for none.
    session: str = ""
    #: Pairs that refused each other, by identity, with the differing field.
    misfits: dict[tuple[str, ...], str] = field(default_factory=dict)
    demand: Demand = field(init=False)

    def __post_init__(self) -> None:
        self.demand = Demand(self.request.context, self.session, self.samples)

    @property
    def rank(self) -> float:
        """The smaller, the sooner: as if it had come that much earlier, or later. Decode workers rank alike."""
        return self.arrived - self.priority * PRIORITY_S


class Placer:
    """Places requests by priority and age: when the workers are full, only the first in the queue asks again.

    A request waits for room as long as its caller lets it (the request's deadline), and `patience_s` at most for
    a worker to come back when there is none.
    """

    def __init__(self, pool: WorkerPool, leases: Leases, policy: Policy, *, patience_s: float) -> None:
        self._policy = policy
        self._pool = pool
        self._leases = leases
        self._patience_s = patience_s
        self._turns = Turns()

    @property
    def waiting(self) -> int:
        """Those that wait for room."""
        return len(self._turns)

    async def place(self, search: Search) -> Placement:
        """Raises RpcFailure UNAVAILABLE when no pair can serve, InvalidRequestError when a worker refuses for good,
        NoRoomTogetherError when it was the turn of several samples and no worker could take them together.
        """
        if self._turns.first(search.rank) and (placement := await self._ask_all(search)):
            return placement
        with self._turns.join(search.rank) as turn:
            await turn.mine()
            pauses, together_until = backoff(), time.monotonic() + _TOGETHER_S
            while True:
                began = time.monotonic()
                if placement := await self._ask_all(search) or await self._queue_up(search):
                    return placement
                now = time.monotonic()
                if search.samples > 1 and now >= together_until and self._pool.lacking_since is None:
                    raise NoRoomTogetherError
                if now - began > _WAIT_BESIDE_OTHERS_S / 2:  # the worker has let us wait: no need to hold back, too
                    pauses = backoff()
                await self._pool.wait_for_change(next(pauses))
                await turn.mine()

    async def _ask_all(self, search: Search) -> Placement | None:
        """Asks every decode worker once, in the policy's order; None when all are busy or gone for the moment."""
        fitting = self._fitting(search)
        asked: set[Worker] = set()
        for pair in fitting:
            if pair.decode in asked:
                continue
            if placement := await self._reserve(pair, search, wait_s=0.0):
                return placement
            if pair.identity not in search.misfits:  # busy or gone: no prefill worker changes that
                asked.add(pair.decode)
        return None

    async def _queue_up(self, search: Search) -> Placement | None:
        """Waits at the policy's first decode worker, where the requests of other gateways wait by the same ranks."""
        fitting = self._fitting(search)
        if not fitting:
            return None
        alone = all(pair.decode is fitting[0].decode for pair in fitting)
        wait_s = min(_WAIT_S if alone else _WAIT_BESIDE_OTHERS_S, search.until - time.monotonic())
        return await self._reserve(fitting[0], search, wait_s=max(0.0, wait_s))

    def _fitting(self, search: Search) -> list[Pair]:
        """The pairs to ask, best first; none when waiting may help. Raises RpcFailure when it will not."""
        pairs = self._pool.pairs()
        fitting = [pair for pair in pairs.fitting if pair.identity not in search.misfits]
        if not fitting:
            self._explain(next(iter(search.misfits.values()), pairs.misfit))
            return []
        return self._policy.order(fitting, search.demand)

    async def _reserve(self, pair: Pair, search: Search, *, wait_s: float) -> Placement | None:
        assert pair.prefill.status
        queued_s = time.monotonic() - search.arrived
        request = decode_pb2.ReserveRequest(
            request_id=search.request_id,
            context_length=len(search.request.context),
            max_length=search.request.max_length,
            fingerprint=convert.fingerprint_to_proto(pair.prefill.status.fingerprint),
            attempt=search.attempt,
            samples=search.samples,
            priority=search.priority,
            queued_ms=min(int(queued_s * 1000), LONGEST_MS),
            wait_ms=int(wait_s * 1000),
            context=search.request.context,
        )
        try:
            with self._pool.using(pair, search.samples):
                placement = await self._leases.reserve(pair, request)
        except RpcFailure as error:
            self._note_refusal(pair, search, error)
            return None
        forecast = self._policy.placed(pair, search.demand, placement.held_tokens)
        return dataclasses.replace(placement, forecast=forecast)

    def _note_refusal(self, pair: Pair, search: Search, error: RpcFailure) -> None:
        match error.code:
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return
            case grpc.StatusCode.INVALID_ARGUMENT if search.samples > 1:
                raise NoRoomTogetherError from error
            case grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequestError(error.details) from error
            case grpc.StatusCode.FAILED_PRECONDITION:
                reason = f"{pair.decode} refuses {pair.prefill}: {error.details}"
                search.misfits[pair.identity] = reason
                logger.warning("%s", reason, extra=about(search.request_id))
            case _:
                logger.warning("%s: Reserve failed: %s", pair.decode, error, extra=about(search.request_id))
                self._pool.suspect(pair.decode)

    def _explain(self, misfit: str) -> None:
        """Called while no pair fits: raises when waiting will not help, or has not helped long enough."""
        lacking_since = self._pool.lacking_since
        if lacking_since is None:
            if misfit:
                raise RpcFailure(grpc.StatusCode.UNAVAILABLE, f"no prefill and decode worker fit together: {misfit}")
        elif time.monotonic() - lacking_since > self._patience_s:
            roles = [worker.role for worker in self._pool.workers if worker.healthy]
            have = f"only a {roles[0]} worker is" if roles else "neither a prefill nor a decode worker is"
            raise RpcFailure(
                grpc.StatusCode.UNAVAILABLE, f"no worker can serve: {have} there for {self._patience_s:g} s"
            )


def backoff() -> Iterator[float]:
    """Seconds to pause, growing to half a second, with jitter so that gateways don't ask in step. Never ends."""
    pause_s = _FIRST_BACKOFF_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, _LONGEST_BACKOFF_S)
