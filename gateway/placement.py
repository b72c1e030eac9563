"""Finding a pair of workers for an attempt, and a lease on the decode worker's blocks."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc

from branchline.core import InvalidRequestError, Request
from branchline.v1 import decode_pb2
from branchline.wire import convert
from branchline.wire.status import RpcFailure
from gateway.leases import Leases, Placement
from gateway.pool import Pair, WorkerPool
from gateway.worker import Worker

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.02
_LONGEST_BACKOFF_S = 0.5


@dataclass(slots=True)
class Search:
    """What one request has learned about the workers, over all of its attempts."""

    request: Request
    attempt: int
    #: Pairs that refused each other, by identity, with the differing field.
    misfits: dict[tuple[str, ...], str] = field(default_factory=dict)


class Placer:
    """Places requests, first come, first served: when the workers are full, only the head of the queue asks again.

    A request waits for room as long as its caller lets it (the request's deadline), and `patience_s` at most for
    a worker to come back when there is none.
    """

    def __init__(self, pool: WorkerPool, leases: Leases, *, patience_s: float) -> None:
        self._pool = pool
        self._leases = leases
        self._patience_s = patience_s
        self._queue = asyncio.Lock()  # fair: it wakes its waiters in order

    async def place(self, search: Search) -> Placement:
        """Raises RpcFailure UNAVAILABLE when no pair can serve, InvalidRequestError when a worker refuses for good."""
        if not self._queue.locked() and (placement := await self._try_all(search)):
            return placement
        async with self._queue:
            for pause_s in backoff():
                if placement := await self._try_all(search):
                    return placement
                await self._pool.wait_for_change(pause_s)
        raise AssertionError("the pauses never end")

    async def _try_all(self, search: Search) -> Placement | None:
        """Asks every decode worker once, the least loaded first; None when all are busy or gone for the moment."""
        pairs = self._pool.pairs()
        fitting = [pair for pair in pairs.fitting if pair.identity not in search.misfits]
        if not fitting:
            self._explain(next(iter(search.misfits.values()), pairs.misfit))
        asked: set[Worker] = set()
        for pair in fitting:
            if pair.decode in asked:
                continue
            with self._pool.using(pair):
                placement = await self._reserve(pair, search)
            if placement:
                return placement
            if pair.identity not in search.misfits:  # busy or gone: no prefill worker changes that
                asked.add(pair.decode)
        return None

    async def _reserve(self, pair: Pair, search: Search) -> Placement | None:
        assert pair.prefill.status
        request = decode_pb2.ReserveRequest(
            request_id=search.request.request_id,
            context_length=len(search.request.context),
            max_length=search.request.max_length,
            fingerprint=convert.fingerprint_to_proto(pair.prefill.status.fingerprint),
            attempt=search.attempt,
        )
        try:
            return await self._leases.reserve(pair, request)
        except RpcFailure as error:
            self._note_refusal(pair, search, error)
            return None

    def _note_refusal(self, pair: Pair, search: Search, error: RpcFailure) -> None:
        match error.code:
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return
            case grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequestError(error.details) from error
            case grpc.StatusCode.FAILED_PRECONDITION:
                reason = f"{pair.decode} refuses {pair.prefill}: {error.details}"
                search.misfits[pair.identity] = reason
                logger.warning("%s", reason)
            case _:
                logger.warning("%s: Reserve failed: %s", pair.decode, error)
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
