"""How much of its limits a key has used: two token buckets and a count."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import grpc

from branchline.core import InvalidRequestError
from branchline.wire.status import RpcFailure
from gateway.keys import KeyLimits

_MINUTE_S = 60.0
#: Seconds after which somebody with too many requests running may try again: they end within seconds.
_BUSY_RETRY_S = 1.0


@dataclass(slots=True)
class Bucket:
    """Fills up with time to a minute's worth, full at first. Times are of the monotonic clock."""

    per_minute: int
    level: float
    at: float

    @classmethod
    def full(cls, per_minute: int) -> Bucket:
        return cls(per_minute, float(per_minute), time.monotonic())

    def wait_s(self, amount: float) -> float:
        """Seconds until it holds so much; 0 when it does. More than a minute's worth is waited for in vain: then until
        it is full.
        """
        self._fill()
        return max(0.0, min(amount, self.per_minute) - self.level) * _MINUTE_S / self.per_minute

    def take(self, amount: float) -> None:
        """It may be overdrawn: what has been used has been used."""
        self._fill()
        self.level -= amount

    def resize(self, per_minute: int) -> None:
        """What was used stays used."""
        self._fill()
        self.level = min(self.level + per_minute - self.per_minute, per_minute)
        self.per_minute = per_minute

    def _fill(self) -> None:
        now = time.monotonic()
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / _MINUTE_S)
        self.at = now


@dataclass(slots=True, eq=False)
class Quota:
    """Of one key. Refusals cost nothing. Belongs to one event loop."""

    limits: KeyLimits
    running: int = 0
    _requests: Bucket | None = field(init=False)
    _tokens: Bucket | None = field(init=False)

    def __post_init__(self) -> None:
        self._requests = _bucket(None, self.limits.requests_per_minute)
        self._tokens = _bucket(None, self.limits.tokens_per_minute)

    def resize(self, limits: KeyLimits) -> None:
        """New limits for what has been used."""
        self.limits = limits
        self._requests = _bucket(self._requests, limits.requests_per_minute)
        self._tokens = _bucket(self._tokens, limits.tokens_per_minute)

    def count(self, requests: int) -> None:
        """So many requests come. Raises RpcFailure when that is too many now, InvalidRequestError when it always is."""
        if not self._requests or not requests:
            return
        most = self.limits.requests_per_minute
        _require_possible(requests, most, "requests that this key may make a minute")
        _require(self._requests, requests, f"this key may make {most} requests a minute")
        self._requests.take(requests)

    def check_room(self, requests: int) -> None:
        """So many want to generate. Raises like `count`, also while earlier ones have used too many tokens."""
        most = self.limits.concurrency
        if most:
            _require_possible(requests, most, "requests that this key may have running")
        if most and self.running + requests > most:
            raise RpcFailure(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this key may have {most} requests running, and has {self.running}",
                retry_after_s=_BUSY_RETRY_S,
            )
        if self._tokens:
            # How many an answer will have is not known yet: it may overdraw the bucket; the next one waits for that.
            _require(self._tokens, 1, f"this key may use {self.limits.tokens_per_minute} tokens a minute")

    def use(self, tokens: int) -> None:
        if self._tokens:
            self._tokens.take(tokens)


def _bucket(before: Bucket | None, per_minute: int) -> Bucket | None:
    if not per_minute:
        return None
    if before is None:
        return Bucket.full(per_minute)
    before.resize(per_minute)
    return before


def _require_possible(requests: int, most: int, limit: str) -> None:
    if requests > most:
        raise InvalidRequestError(f"prompt: {requests} prompts are more than the {most} {limit}")


def _require(bucket: Bucket, amount: float, limit: str) -> None:
    if wait_s := bucket.wait_s(amount):
        raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, limit, retry_after_s=wait_s)
