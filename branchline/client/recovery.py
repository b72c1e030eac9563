"""What a client does when a call breaks: it waits as long as it was told to, and goes on behind what it has."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from branchline.client.errors import BranchlineError, InvalidRequestError, OverloadedError, UnavailableError
from branchline.v1 import gateway_pb2

#: Attempts without a new token between them, after the first one.
DEFAULT_RETRIES = 3
MAX_RETRIES = 100
#: Seconds before the first of them; twice as long before each further one. Half of it is drawn at random, so that the
#: clients of a gateway that broke don't come back all at once.
PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
#: A server that names a longer time is not waited for: the caller should know.
LONGEST_HINT_S = 10.0

RequestT = TypeVar("RequestT", gateway_pb2.GenerateRequest, gateway_pb2.ChatRequest)


class Recovery(Generic[RequestT]):
    """Of one generating call. `received` tells what the client has of each sample."""

    def __init__(
        self,
        request: RequestT,
        received: Callable[[], Sequence[gateway_pb2.ReceivedSample]],
        *,
        retries: int,
        timeout_s: float,
    ) -> None:
        """With `retries` a sampled request is given a seed if it has none: it must be known to go on."""
        self._request: RequestT = request
        self._received = received
        self._retries = retries
        self._until = time.monotonic() + timeout_s
        self._failures = 0
        self._tokens = 0
        options = _options(request)
        if retries and options.temperature and not options.HasField("seed"):
            options.seed = random.SystemRandom().getrandbits(63)

    @property
    def timeout_s(self) -> float:
        """What is left of the call's time."""
        return max(0.0, self._until - time.monotonic())

    def request(self) -> RequestT:
        """What to ask for now."""
        received = self._received()
        request = copy.deepcopy(self._request)
        _options(request).received.extend(received)
        return request

    def pause(self, error: BranchlineError) -> float:
        """Seconds after which the call is to be made again. Raises `error` when it is not to be."""
        tokens = sum(len(sample.token_ids) for sample in self._received())
        self._failures = 1 if tokens > self._tokens else self._failures + 1
        self._tokens = tokens
        hint = error.retry_after
        mends = isinstance(error, UnavailableError) or (isinstance(error, OverloadedError) and hint is not None)
        mends = mends and not error.final and (hint or 0.0) <= LONGEST_HINT_S
        longest = min(PAUSE_S * 2.0 ** (self._failures - 1), LONGEST_PAUSE_S)
        pause = max(random.uniform(longest / 2, longest), hint or 0.0)
        if not mends or self._failures > self._retries or pause >= self.timeout_s:
            raise error
        return pause


def check_retries(retries: int) -> int:
    if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= MAX_RETRIES:
        raise InvalidRequestError(f"retries: must be an integer from 0 to {MAX_RETRIES}, got {retries!r}")
    return retries


def _options(request: gateway_pb2.GenerateRequest | gateway_pb2.ChatRequest) -> gateway_pb2.GenerateRequest:
    return request.options if isinstance(request, gateway_pb2.ChatRequest) else request
