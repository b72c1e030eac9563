"""One attempt at a request on one pair of workers: two legs, one stream of tokens.

The decode worker's Attach is opened first, so that no token can be missed; then the prefill worker is asked to
compute and to ship to that lease. Both legs report into one queue, which the attempt reads: tokens carry their
output index, so the first one, which both report, is taken once, and a gap is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from branchline.core import FinishReason, InvalidRequestError
from branchline.v1 import decode_pb2, prefill_pb2
from branchline.wire import convert
from branchline.wire.status import RpcFailure
from gateway.background import cancel_all
from gateway.journal import AttemptRecord, JournalEntry
from gateway.leases import Placement
from gateway.worker import Worker

#: Events between the legs and the attempt; when they are full, gRPC's flow control slows the workers down.
_QUEUE = 64
#: Seconds that a decode worker may take to open the stream.
_ATTACH_TIMEOUT_S = 5.0

#: Takes new tokens; returns True when they complete a stop string, so that no more are wanted.
Deliver = Callable[[Sequence[int]], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Completed:
    """The request has all of its tokens. `lease_done`: the decode worker has said so itself."""

    reason: FinishReason
    lease_done: bool = False


class AttemptFailedError(Exception):
    """This attempt will give no more tokens; another may.

    `suspects` are the workers that may be to blame; `misfit` is set when they refused each other, `busy` when the
    prefill worker had no room (then nothing is wrong, and the attempt does not count).
    """

    def __init__(self, reason: str, *suspects: Worker, misfit: bool = False, busy: bool = False) -> None:
        super().__init__(reason)
        self.suspects = suspects
        self.misfit = misfit
        self.busy = busy


@dataclass(frozen=True, slots=True)
class _Ended:
    """A leg's stream is over; `failure` is None when it ended well."""

    leg: Worker
    failure: RpcFailure | None = None


_Event = decode_pb2.AttachResponse | prefill_pb2.PrefillResponse | _Ended


class Attempt:
    """`deliver` gets each token once, in order, from the request's next output index on."""

    def __init__(
        self,
        entry: JournalEntry,
        record: AttemptRecord,
        placement: Placement,
        deliver: Deliver,
        *,
        stall_timeout_s: float,
        timeout_s: float,
    ) -> None:
        self._entry = entry
        self._record = record
        self._prefill = placement.pair.prefill
        self._decode = placement.pair.decode
        self._placement = placement
        self._deliver = deliver
        self._start = len(entry.emitted)  # output index of the first token that prefill samples
        self._stall_timeout_s = stall_timeout_s
        self._timeout_s = timeout_s
        self._events: asyncio.Queue[_Event] = asyncio.Queue(maxsize=_QUEUE)
        self._decoding = False  # the decode worker has everything: the prefill leg does not matter any more

    async def run(self) -> Completed:
        """Raises AttemptFailedError, or InvalidRequestError when the workers refuse the request for good.

        Both calls have ended, or are cancelled, when it returns or raises; the lease is the caller's to end.
        """
        request = convert.request_to_proto(self._entry.next_request())
        legs = {self._open(self._decode, "Attach", self._attach_request(request))}
        try:
            await self._attached()
            legs.add(self._open(self._prefill, "Prefill", self._prefill_request(request)))
            while True:
                if completed := await self._handle(await self._next_event(self._stall_timeout_s)):
                    return completed
        finally:
            await cancel_all(legs)

    def _attach_request(self, request: Any) -> decode_pb2.AttachRequest:
        return decode_pb2.AttachRequest(lease_id=self._placement.lease_id, request=request)

    def _prefill_request(self, request: Any) -> prefill_pb2.PrefillRequest:
        return prefill_pb2.PrefillRequest(
            request=request,
            decode_address=self._decode.address,
            lease_id=self._placement.lease_id,
            ship_draft=self._placement.accepts_draft,
        )

    def _open(self, worker: Worker, method: str, request: Any) -> asyncio.Task[None]:
        return asyncio.create_task(self._read(worker, method, request), name=f"{method} {self._entry.request_id}")

    async def _read(self, worker: Worker, method: str, request: Any) -> None:
        """One leg: passes the responses on; cancelling it cancels the call."""
        failure = None
        try:
            async with contextlib.aclosing(worker.stream(method, request, self._timeout_s)) as responses:
                async for response in responses:
                    await self._events.put(response)
        except RpcFailure as error:
            failure = error
        await self._events.put(_Ended(worker, failure))

    async def _next_event(self, timeout_s: float) -> _Event:
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._events.get()
            except TimeoutError:
                # Waiting for one's turn at a busy prefill worker is no stall: that one gets on with others' prompts.
                queued = len(self._entry.emitted) == self._start and not self._decoding
                if queued and self._prefill.progressed_within(timeout_s):
                    continue
            suspects = [self._decode] if self._decoding else [self._prefill, self._decode]
            raise AttemptFailedError(f"no token for {timeout_s:g} s", *suspects)

    async def _attached(self) -> None:
        try:
            async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                event = await self._events.get()
        except TimeoutError:
            raise AttemptFailedError("the token stream was not opened in time", self._decode) from None
        if isinstance(event, _Ended):
            self._fail(event)
        if not isinstance(event, decode_pb2.AttachResponse) or event.WhichOneof("event") != "attached":
            raise AttemptFailedError("the stream did not begin with `attached`", self._decode)

    async def _handle(self, event: _Event) -> Completed | None:
        match event:
            case decode_pb2.AttachResponse():
                return await self._handle_decode(event)
            case prefill_pb2.PrefillResponse():
                return await self._handle_prefill(event)
            case _Ended():
                if event.leg is not self._prefill or not self._decoding:
                    self._fail(event)
        return None

    async def _handle_decode(self, event: decode_pb2.AttachResponse) -> Completed | None:
        match event.WhichOneof("event"):
            case "tokens":
                self._decoding = True
                self._record.speculation = convert.speculation_from_proto(event.tokens.speculation)
                return await self._take(event.tokens.index, event.tokens.token_ids, self._decode)
            case "finished":
                reason = self._finish_reason(event.finished.reason, self._decode)
                if reason is None or not self._entry.emitted:
                    raise AttemptFailedError("the decode worker finished without a reason or a token", self._decode)
                return Completed(reason, lease_done=True)
        return None

    async def _handle_prefill(self, event: prefill_pb2.PrefillResponse) -> Completed | None:
        match event.WhichOneof("event"):
            case "first_token":
                first = event.first_token
                if completed := await self._take(self._start, [first.token_id], self._prefill):
                    return completed
                reason = self._finish_reason(first.finish_reason, self._prefill)
                return Completed(reason) if reason else None
            case "handed_off":
                self._decoding = True
        return None

    async def _take(self, index: int, token_ids: Sequence[int], source: Worker) -> Completed | None:
        """Delivers what is new of tokens from output index `index` on."""
        emitted = self._entry.emitted
        known = len(emitted) - index
        if known < 0:
            raise AttemptFailedError(f"tokens {len(emitted)} to {index - 1} are missing", source)
        if list(token_ids[:known]) != emitted[index : index + len(token_ids)]:
            raise AttemptFailedError(f"token {index} and following came twice, and differ", source)
        new = token_ids[known:]
        if len(emitted) + len(new) > self._entry.max_tokens:
            raise AttemptFailedError(f"more tokens than max_tokens, {self._entry.max_tokens}", source)
        stopped = await self._deliver(new) if new else False
        return Completed(FinishReason.STOP) if stopped else None

    def _finish_reason(self, value: Any, source: Worker) -> FinishReason | None:
        try:
            return convert.finish_reason_from_proto(value)
        except InvalidRequestError as error:
            raise AttemptFailedError(str(error), source) from error

    def _fail(self, end: _Ended) -> NoReturn:
        failure = end.failure
        if failure is None:
            raise AttemptFailedError(f"{end.leg.role}: the stream ended early", end.leg)
        reason = f"{end.leg.role}: {failure}"
        match failure.code:
            case grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequestError(failure.details)
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise AttemptFailedError(reason, busy=True)
            case grpc.StatusCode.FAILED_PRECONDITION:
                raise AttemptFailedError(reason, misfit=True)
            case grpc.StatusCode.ABORTED:  # the lease was ended, by a hand-off that failed or to make room
                raise AttemptFailedError(reason)
            case grpc.StatusCode.UNAVAILABLE if end.leg is self._prefill:  # it, or the decode worker as it sees it
                raise AttemptFailedError(reason, self._prefill, self._decode)
            case _:
                raise AttemptFailedError(reason, end.leg)
