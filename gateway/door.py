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
from gateway.keys import Key, Keyring
from gateway.quota import Quota

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
    #: Metadata or headers, names in lower case. Not shown: a key is among them.
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Seconds that the client gives it; None leaves it to the gateway.
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Guest:
    """A call that may come in, as `Door.greet` found. Whatever is done for a call asks for it."""

    call: Call
    #: Of the caller; None where none is needed.
    key: Key | None = None
    quota: Quota | None = None

    def may_see(self, other: Guest) -> bool:
        """Whether it may know of, and end, another's requests: those of its own key, unless it is an operator's."""
        return self.key is None or self.key.operator or (other.key is not None and other.key.hash == self.key.hash)


@dataclass(slots=True, eq=False)
class Visit:
    """A guest's call that was let in and generates. `requests`: how many it counts for, one for each prompt."""

    guest: Guest
    request_id: str
    requests: int
    #: On the monotonic clock.
    arrived: float = field(default_factory=time.monotonic)
    #: All samples of all prompts, as soon as they are known.
    entries: Sequence[JournalEntry] = ()
    #: How and why somebody ended it.
    aborted: RpcFailure | None = None
    #: Tokens that its key's quota knows of.
    settled: int = 0
    _limit: asyncio.Timeout | None = None

    @property
    def call(self) -> Call:
        return self.guest.call

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each once however many samples it has."""
        return sum(len(entry.prompt) for entry in self.entries if entry.sampling.sample_index == 0)

    @property
    def completion_tokens(self) -> int:
        """So far, over all samples."""
        return sum(len(entry.emitted) for entry in self.entries)

    def settle(self) -> None:
        """Tells its key's quota what it has used since the last time."""
        used = self.prompt_tokens + self.completion_tokens
        if self.guest.quota:
            self.guest.quota.use(used - self.settled)
        self.settled = used

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

    def __init__(self, config: GatewayConfig, keyring: Keyring | None = None) -> None:
        """Without a keyring nobody needs a key."""
        self._keyring = keyring
        #: By the key's hash; of keys that have come and are valid.
        self._quotas: dict[str, Quota] = {}
        self._max_requests = config.max_requests
        self._visits: dict[str, Visit] = {}
        self._closed = self._drains = False

    def drain(self) -> None:
        """Nobody comes in any more to generate: another gateway may serve them. Who is inside stays."""
        self._drains = True

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
        if self._keyring is None:
            return Guest(call)
        key = self._key(call, self._keyring)
        quota = self._quotas.setdefault(key.hash, Quota(key.limits))
        quota.count(1)
        return Guest(call, key, quota)

    @contextlib.contextmanager
    def admit(self, guest: Guest, requests: int = 1) -> Iterator[Visit]:
        """Lets a guest in who wants to generate for so many prompts. Raises RpcFailure when there is no room, or
        InvalidRequestError when there can't be any for so many.
        """
        if self._drains:
            raise self._stopping()
        active = self.active_requests
        if active + requests > self._max_requests:
            raise RpcFailure(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the gateway serves {active} requests already, and {self._max_requests} at most",
                retry_after_s=RETRY_AFTER_S,
            )
        visit = Visit(guest, secrets.token_hex(8), requests)
        with self._within_limits(visit):
            self._visits[visit.request_id] = visit
            try:
                yield visit
            finally:
                del self._visits[visit.request_id]

    def visits_for(self, guest: Guest) -> list[Visit]:
        """Those that a guest may know of."""
        return [visit for visit in self.visits if guest.may_see(visit.guest)]

    def abort(self, guest: Guest, request_id: str, reason: str) -> None:
        """Ends a request that is being served. Raises RpcFailure when the guest may know of none of that name."""
        visit = self._visits.get(request_id)
        if visit is None or not guest.may_see(visit.guest):
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, f"no request {request_id[:64]!r} is being served")
        visit.abort(RpcFailure(grpc.StatusCode.CANCELLED, f"the request was aborted: {reason[:MAX_REASON_CHARS]}"))

    def keys_changed(self) -> None:
        """To be called when the keyring has: ends what revoked keys are doing, and takes over new limits."""
        assert self._keyring is not None
        for visit in self.visits:
            if visit.guest.key and not self._keyring.by_hash(visit.guest.key.hash):
                visit.abort(_unauthenticated("the API key was revoked"))
        for hash_, quota in list(self._quotas.items()):
            key = self._keyring.by_hash(hash_)
            if key is None:
                del self._quotas[hash_]
            elif key.limits != quota.limits:
                quota.resize(key.limits)

    @contextlib.contextmanager
    def _within_limits(self, visit: Visit) -> Iterator[None]:
        """Of the guest's key. Raises like `admit`."""
        guest, quota = visit.guest, visit.guest.quota
        if guest.key is None or quota is None:
            yield
            return
        assert self._keyring is not None
        if not self._keyring.by_hash(guest.key.hash):  # since it was greeted
            raise _unauthenticated("the API key was revoked")
        for other in self.visits:
            if other.guest.quota is quota:
                other.settle()
        quota.check_room(visit.requests)
        quota.count(visit.requests - 1)  # the first was counted when it was greeted
        quota.running += visit.requests
        try:
            yield
        finally:
            quota.running -= visit.requests
            visit.settle()

    @staticmethod
    def _key(call: Call, keyring: Keyring) -> Key:
        """The caller's. Raises RpcFailure UNAUTHENTICATED."""
        scheme, _, presented = call.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not presented:
            raise _unauthenticated("an API key is needed: authorization: Bearer KEY")
        key = keyring.find(presented.strip())
        if key is None:
            logger.info("%s %s refused: the API key is not known", call.interface, call.method)
            raise _unauthenticated("the API key is not known, or was revoked")
        return key


def _unauthenticated(details: str) -> RpcFailure:
    return RpcFailure(grpc.StatusCode.UNAUTHENTICATED, details)
