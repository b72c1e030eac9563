"""A request's life in the gateway: attempts one after the other, one stream of tokens to the client."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import grpc

from branchline.core import FinishReason
from branchline.v1 import gateway_pb2
from branchline.wire import convert
from branchline.wire.status import RpcFailure
from gateway.attempt import Attempt, AttemptFailedError, Completed
from gateway.backend import Backend
from gateway.journal import AttemptRecord, JournalEntry
from gateway.leases import Placement
from gateway.output import Output
from gateway.placement import Search, backoff

logger = logging.getLogger(__name__)

#: The legs' own deadlines are this much later than the request's: it ends by being cancelled, and no worker is
#: taken for a failed one because time was up.
LEG_MARGIN_S = 1.0

Write = Callable[[gateway_pb2.GenerateResponse], Awaitable[None]]


class Relay:
    """Runs one request. The caller owns the deadline: it cancels `run` when the deadline has passed."""

    def __init__(self, backend: Backend, entry: JournalEntry, output: Output, write: Write, until: float) -> None:
        """`until` is the deadline on the monotonic clock."""
        self._backend = backend
        self._entry = entry
        self._output = output
        self._write = write
        self._until = until
        self._search = Search(request=entry.next_request(), attempt=0)
        self._waiting_for_room = False

    async def run(self) -> None:
        """Writes all responses. Raises RpcFailure or InvalidRequestError when no attempt can succeed."""
        pauses = backoff()
        while (reason := self._entry.ended) is None:
            try:
                completed = await self._attempt()
            except AttemptFailedError as error:
                if error.busy:
                    self._waiting_for_room = True
                    await self._backend.pool.wait_for_change(next(pauses))
                else:
                    self._check_attempts_left()
            else:
                reason = completed.reason
                break
        await self._finish(reason)

    def timed_out(self) -> RpcFailure:
        """What the passing of the deadline means for this request."""
        if self._waiting_for_room and self._backend.pool.lacking_since is None:
            return RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "all workers were busy until the deadline")
        details = f"the deadline passed after {len(self._entry.emitted)} tokens"
        if self._entry.failures:
            details += f"; {self._entry.failures}"
        return RpcFailure(grpc.StatusCode.DEADLINE_EXCEEDED, details)

    async def _attempt(self) -> Completed:
        """Places the request and follows it. Raises AttemptFailedError, after having noted it everywhere."""
        placement = await self._place()
        pool = self._backend.pool
        pair = placement.pair
        record = AttemptRecord(pair.prefill.address, pair.decode.address)
        self._entry.attempts.append(record)
        attempt = Attempt(
            self._entry,
            record,
            placement,
            self._deliver,
            stall_timeout_s=self._backend.config.stall_timeout_s,
            timeout_s=self._until - time.monotonic() + LEG_MARGIN_S,
        )
        reason, lease_done = "the request was cancelled", False
        try:
            with pool.using(pair):
                completed = await attempt.run()
            reason, lease_done = f"the request is complete: {completed.reason}", completed.lease_done
            return completed
        except AttemptFailedError as error:
            reason = record.failure = str(error)
            logger.warning("request %s: %s", self._entry.request_id, self._entry.failures)
            if error.busy:  # nothing was wrong, so it does not count
                self._entry.attempts.remove(record)
            if error.misfit:
                self._search.misfits[pair.identity] = reason
            pool.suspect(*error.suspects)
            raise
        finally:
            if lease_done:
                pool.note_room()
            else:
                self._backend.leases.end(placement, reason)

    async def _place(self) -> Placement:
        self._search.request = self._entry.next_request()
        self._search.attempt += 1
        self._waiting_for_room = True
        placement = await self._backend.placer.place(self._search)
        self._waiting_for_room = False
        return placement

    def _check_attempts_left(self) -> None:
        if time.monotonic() >= self._until:
            raise self.timed_out()
        if len(self._entry.attempts) >= self._backend.config.max_attempts:
            raise RpcFailure(grpc.StatusCode.UNAVAILABLE, f"the request failed: {self._entry.failures}")

    async def _deliver(self, token_ids: Sequence[int]) -> bool:
        piece = self._output.push(token_ids)
        self._entry.record(piece.token_ids)
        await self._write(gateway_pb2.GenerateResponse(text=piece.text, token_ids=piece.token_ids))
        return self._output.stopped

    async def _finish(self, reason: FinishReason) -> None:
        entry = self._entry
        text, reason = self._output.finish(reason)
        completion = gateway_pb2.Completion(
            finish_reason=convert.finish_reason_to_proto(reason),
            usage=gateway_pb2.Usage(prompt_tokens=len(entry.prompt), completion_tokens=len(entry.emitted)),
            speculation=convert.speculation_to_proto(entry.speculation),
            seed=entry.sampling.seed,
            failovers=entry.failovers,
        )
        await self._write(gateway_pb2.GenerateResponse(text=text, finished=completion))
