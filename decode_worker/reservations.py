"""Reservations that wait for their turn, seen from the event loop.

The engine grants them (`engine_loop`); here each has somebody who waits for it, for a limited time. Whoever stops
waiting, by a cancellation, a deadline or an error, takes the reservation back. That may happen in the moment in which
it is granted: then its leases end, or what was granted without anybody hearing of it is released.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from branchline.core import MAX_PRIORITY, MAX_SAMPLES, InvalidRequestError
from branchline.engine.blocks import OutOfBlocksError
from branchline.engine.thread import EngineStoppedError, EngineThread
from branchline.wire.status import RpcFailure
from decode_worker.admission import Reservation, rank_of
from decode_worker.engine_loop import DecodeLoop
from decode_worker.leases import Lease

logger = logging.getLogger(__name__)

#: Seconds that one call waits at most. A caller that wants to wait longer calls again: its age counts.
MAX_WAIT_S = 60.0
#: Reservations that wait at once.
MAX_WAITING = 1024


@dataclass(frozen=True, slots=True)
class Ask:
    """What a gateway asks for. `queued_s`: how long its client has waited elsewhere."""

    request_id: str
    attempt: int
    context_length: int
    max_length: int
    accepts_draft: bool
    samples: int = 1
    priority: int = 0
    queued_s: float = 0.0
    #: The context's token ids; empty when it is neither to find KV that is here nor to leave any.
    context: tuple[int, ...] = field(default=(), repr=False)

    def check(self, max_batch: int) -> None:
        """Raises InvalidRequestError."""
        if not self.request_id or self.attempt < 1 or not 1 <= self.context_length < self.max_length:
            raise InvalidRequestError(
                "a reservation needs a request_id, an attempt from 1 and 1 <= context_length < max_length, got "
                f"{self.request_id!r}, {self.attempt}, {self.context_length}, {self.max_length}"
            )
        if len(self.context) not in (0, self.context_length):
            raise InvalidRequestError(f"{len(self.context)} token ids of a context of {self.context_length}")
        if not 1 <= self.samples <= min(MAX_SAMPLES, max_batch):
            raise InvalidRequestError(
                f"samples must be between 1 and {min(MAX_SAMPLES, max_batch)}, got {self.samples}: this worker decodes "
                f"{max_batch} sequences at once"
            )
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {self.priority}"
            )


@dataclass(eq=False)
class _Waiting:
    ask: Ask
    reservation: Reservation
    leases: asyncio.Future[list[Lease]]

    def refuse(self, code: grpc.StatusCode, reason: str) -> None:
        if not self.leases.done():
            self.leases.set_exception(RpcFailure(code, reason))


class Reservations:
    """`opened` makes the leases of a grant, `aborted` ends one of them."""

    def __init__(
        self,
        thread: EngineThread,
        engine: DecodeLoop,
        opened: Callable[[Ask, Reservation, int], list[Lease]],
        aborted: Callable[[str, str], None],
    ) -> None:
        self._thread = thread
        self._engine = engine
        self._opened = opened
        self._aborted = aborted
        #: By sample 0's lease id.
        self._waiting: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def obtain(self, ask: Ask, lease_ids: tuple[str, ...], now: float, wait_s: float) -> list[Lease]:
        """The leases, in the order of the samples, once it is their turn.

        Raises InvalidRequestError when they can never be had; RpcFailure: RESOURCE_EXHAUSTED when not within `wait_s`,
        0 being at once; ABORTED when superseded, UNAVAILABLE when the worker is stopping.
        """
        if len(self) >= MAX_WAITING:
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WAITING} reservations are waiting already")
        wait_s = min(wait_s, MAX_WAIT_S)
        rank = rank_of(now, ask.queued_s, ask.priority)
        runner = self._engine.runner
        keys = runner.keys(ask.context) if 0 < len(ask.context) < runner.max_model_len else None
        reservation = Reservation(lease_ids, ask.context_length, ask.max_length, rank, ask.priority, keys)
        waiting = _Waiting(ask, reservation, asyncio.get_running_loop().create_future())
        self._waiting[lease_ids[0]] = waiting
        try:
            await self._thread.submit(self._engine.reserve, reservation, wait_s > 0)
            async with asyncio.timeout(wait_s):
                return await waiting.leases
        except OutOfBlocksError as error:
            self._withdraw(waiting, str(error))
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
        except TimeoutError:
            reason = f"its turn did not come within {wait_s:g} s"
            self._withdraw(waiting, reason)
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, reason) from None
        except BaseException as error:
            self._withdraw(waiting, f"the reservation failed: {type(error).__name__}")
            raise
        finally:
            self._waiting.pop(lease_ids[0], None)

    def granted(self, reservation: Reservation, held_tokens: int) -> None:
        """The engine has taken the blocks, the first `held_tokens` tokens' with their KV. When nobody waits any more,
        their release is on its way."""
        waiting = self._waiting.pop(reservation.lease_ids[0], None)
        if waiting is not None and not waiting.leases.done():
            waiting.leases.set_result(self._opened(waiting.ask, reservation, held_tokens))

    def outdated(self, request_id: str, attempt: int) -> bool:
        """Whether a later attempt at the same request waits."""
        return any(one.ask.request_id == request_id and one.ask.attempt > attempt for one in self._waiting.values())

    def supersede(self, request_id: str, attempt: int, reason: str) -> None:
        """Ends the waiting of earlier attempts at a request."""
        for one in self._waiting.values():
            if one.ask.request_id == request_id and one.ask.attempt < attempt:
                one.refuse(grpc.StatusCode.ABORTED, reason)

    def close(self, reason: str) -> None:
        """Ends all waiting."""
        for one in self._waiting.values():
            one.refuse(grpc.StatusCode.UNAVAILABLE, reason)

    def _withdraw(self, waiting: _Waiting, reason: str) -> None:
        leases = waiting.leases
        if leases.done() and not leases.cancelled() and leases.exception() is None:
            for lease in leases.result():
                self._aborted(lease.lease_id, reason)
            return
        leases.cancel()
        self._thread.submit(self._engine.withdraw, waiting.reservation).add_done_callback(on_freed)


def on_freed(freed: asyncio.Future[None]) -> None:
    """Sees to errors of a command that frees blocks. An engine that has stopped has freed everything."""
    error = None if freed.cancelled() else freed.exception()
    if error is not None and not isinstance(error, EngineStoppedError):
        logger.error("blocks could not be freed", exc_info=error)
