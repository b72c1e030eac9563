"""Where every call of a client comes in, by whichever interface: admitted here, counted here, known here while it runs.

This is the one place for what must hold at both interfaces: who may call (keys, limits of one key) and what is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from branchline.config import GatewayConfig
from branchline.wire.status import RpcFailure
from gateway.journal import JournalEntry

logger = logging.getLogger(__name__)

#: Seconds after which a refused client may try again: requests come and go within seconds.
RETRY_AFTER_S = 1.0
MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class Call:
    """A client's call, as the interface that took it sees it."""

    #: "grpc" or "http".
    interface: str
    #: The RPC's name, or the HTTP path.
    method: str
    #: Metadata or headers, names in lower case.
    headers: Mapping[str, str] = field(default_factory=dict)
    #: Seconds that the client gives it; None leaves it to the gateway.
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Guest:
    """A call that may come in, as `Door.greet` found. Whatever is done for a call asks for it."""

    call: Call


@dataclass(slots=True, eq=False)
class Visit:
    """A guest's call that was let in and generates. `requests`: how many it counts for, one for each prompt."""

    call: Call
    request_id: str
    requests: int
    #: On the monotonic clock.
    arrived: float = field(default_factory=time.monotonic)
    #: All samples of all prompts, as soon as they are known.
    entries: Sequence[JournalEntry] = ()
    #: How and why somebody ended it.
    aborted: RpcFailure | None = None
    _limit: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def deadline(self, timeout_s: float) -> AsyncIterator[None]:
        """TimeoutError at its end, when `timeout_s` have passed, or when somebody aborts the visit."""
        async with asyncio.timeout(timeout_s) as self._limit:
            if self.aborted is not None:
                self._limit.reschedule(0.0)
            yield

    def abort(self, failure: RpcFailure) -> None:
        """Ends it soon; `failure` is what the client gets."""
        self.aborted = failure
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(0.0)


class Door:
    """Belongs to one event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        self._max_requests = config.max_requests
        self._visits: dict[str, Visit] = {}
        self._closed = False

    def close(self) -> None:
        """Nobody comes in any more, and who is inside is told to go: another gateway may serve them."""
        self._closed = True
        for visit in self.visits:
            visit.abort(self._stopping())

    def _stopping(self) -> RpcFailure:
        return RpcFailure(grpc.StatusCode.UNAVAILABLE, "the gateway is stopping", retry_after_s=RETRY_AFTER_S)

    @property
    def active_requests(self) -> int:
        """Requests that are being served now."""
        return sum(visit.requests for visit in self._visits.values())

    @property
    def max_requests(self) -> int:
        return self._max_requests

    @property
    def visits(self) -> list[Visit]:
        """Those that are being served now, the oldest first."""
        return list(self._visits.values())

    def greet(self, call: Call) -> Guest:
        """To be passed by every call once, before anything of it is read that costs. Raises RpcFailure when it may not
        come in.
        """
        if self._closed:
            logger.info("%s %s refused: the gateway is stopping", call.interface, call.method)
            raise self._stopping()
        return Guest(call)

    @contextlib.contextmanager
    def admit(self, guest: Guest, requests: int = 1) -> Iterator[Visit]:
        """Lets a guest in who wants to generate for so many prompts. Raises RpcFailure when there is no room."""
        active = self.active_requests
        if active + requests > self._max_requests:
            raise RpcFailure(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the gateway serves {active} requests already, and {self._max_requests} at most",
                retry_after_s=RETRY_AFTER_S,
            )
        visit = Visit(guest.call, secrets.token_hex(8), requests)
        self._visits[visit.request_id] = visit
        try:
            yield visit
        finally:
            del self._visits[visit.request_id]

    def abort(self, request_id: str, reason: str) -> None:
        """Ends a request that is being served. Raises RpcFailure when there is none of that name."""
        visit = self._visits.get(request_id)
        if visit is None:
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, f"no request {request_id[:64]!r} is being served")
        visit.abort(RpcFailure(grpc.StatusCode.CANCELLED, f"the request was aborted: {reason[:MAX_REASON_CHARS]}"))
