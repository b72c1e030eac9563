"""Leases on decode workers' blocks: each one made here is used, or given back."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import grpc

from branchline.observe.logs import about
from branchline.v1 import decode_pb2
from branchline.wire.status import RpcFailure
from gateway.background import Background
from gateway.pool import Pair, WorkerPool
from gateway.routing.policy import Forecast

logger = logging.getLogger(__name__)

RESERVE_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Placement:
    """A pair with leases on the decode worker, one for each sample; the first takes the hand-off for all.

    Whoever holds it ends each lease: by finishing, or with `Leases.end`.
    """

    pair: Pair
    lease_ids: tuple[str, ...]
    accepts_draft: bool
    #: Tokens of the context whose KV the decode worker has.
    held_tokens: int = 0
    #: As the decode worker knows it.
    request_id: str = ""
    #: Of the prefill worker's part.
    forecast: Forecast = field(default_factory=Forecast)


class Leases:
    """`pending` counts what is under way without anybody waiting for it: Abort calls, mostly."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._background = Background()

    @property
    def pending(self) -> int:
        return len(self._background)

    async def reserve(self, pair: Pair, request: decode_pb2.ReserveRequest) -> Placement:
        """Raises RpcFailure. When the caller is cancelled meanwhile, the leases that may come are given back."""
        reservation = asyncio.create_task(self._reserve(pair, request))
        try:
            return await asyncio.shield(reservation)
        except asyncio.CancelledError:
            self._background.spawn(self._give_back(reservation), f"give back {request.request_id}")
            raise

    def end(self, placement: Placement, sample: int, reason: str) -> None:
        """Tells the decode worker, without waiting: it would notice by itself, from the closed stream."""
        lease_id = placement.lease_ids[sample]
        self._background.spawn(self._abort(placement, lease_id, reason), f"abort {lease_id}")

    def note_room(self) -> None:
        """A lease has ended by itself: requests that wait for room may try again."""
        self._pool.note_room()

    async def close(self) -> None:
        """Waits for what is under way, not for long."""
        await self._background.drain(ABORT_TIMEOUT_S)
        await self._background.close()

    async def _reserve(self, pair: Pair, request: decode_pb2.ReserveRequest) -> Placement:
        lease = await pair.decode.call("Reserve", request, RESERVE_TIMEOUT_S + request.wait_ms / 1000)
        lease_ids = (lease.lease_id, *lease.sibling_lease_ids)
        placement = Placement(pair, lease_ids, lease.accepts_draft, lease.held_tokens, request.request_id)
        if len(placement.lease_ids) != max(1, request.samples):
            await self._abort_all(placement, "not one lease for each sample")
            raise RpcFailure(
                grpc.StatusCode.INTERNAL, f"{len(placement.lease_ids)} leases came for {request.samples} samples"
            )
        return placement

    async def _give_back(self, reservation: asyncio.Task[Placement]) -> None:
        try:
            placement = await reservation
        except RpcFailure:
            return  # there is no lease
        await self._abort_all(placement, "the request was cancelled")

    async def _abort_all(self, placement: Placement, reason: str) -> None:
        await asyncio.gather(*(self._abort(placement, lease_id, reason) for lease_id in placement.lease_ids))

    async def _abort(self, placement: Placement, lease_id: str, reason: str) -> None:
        decode = placement.pair.decode
        request = decode_pb2.AbortRequest(lease_id=lease_id, reason=reason)
        try:
            await decode.call("Abort", request, ABORT_TIMEOUT_S)
        except RpcFailure as error:
            logger.info("%s: Abort failed: %s", decode, error, extra=about(placement.request_id))
        self._pool.note_room()
