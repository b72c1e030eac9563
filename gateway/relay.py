"""A request's life in the gateway: attempts one after the other, one stream of tokens to the client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

import grpc

from branchline.core import FinishReason
from branchline.observe.logs import about
from branchline.wire.status import RpcFailure
from gateway.attempt import Attempt
from gateway.backend import Backend
from gateway.group import Group
from gateway.intake import Intake
from gateway.journal import AttemptRecord
from gateway.leases import Placement
from gateway.outcome import AttemptEndedError, Cause, Completed, Outcome
from gateway.placement import NoRoomTogetherError, backoff
from gateway.sample import Sample
from gateway.stay import Stay

logger = logging.getLogger(__name__)

#: The legs' own deadlines are this much later than the request's: it ends by being cancelled, and no worker is
#: taken for a failed one because time was up.
LEG_MARGIN_S = 1.0


class Relay:
    """Runs one request, all of its samples. The caller owns the deadline: it cancels `run` when that has passed.

    The samples begin together, so that the prompt is computed once; one whose attempt breaks goes on alone.
    """

    def __init__(self, backend: Backend, samples: Sequence[Sample], until: float) -> None:
        """`until` is the deadline on the monotonic clock."""
        self._backend = backend
        self._samples = samples
        self._until = until
        self._tasks = asyncio.TaskGroup()
        #: Shared by all: pairs that refused each other, by identity, with the differing field.
        self._misfits: dict[tuple[str, ...], str] = {}
        self._finished: set[int] = set()
        self._waiting_for_room: set[int] = set()

    async def run(self) -> None:
        """Writes all responses. Raises RpcFailure or InvalidRequestError when no attempt can succeed."""
        try:
            async with self._tasks:
                resumed = any(sample.entry.emitted for sample in self._samples)
                self._begin(self._samples, most=1 if resumed else self._backend.pool.max_batch)
        except ExceptionGroup as errors:  # the first sample that failed for good; the others were cancelled then
            raise errors.exceptions[0] from None

    def timed_out(self) -> RpcFailure:
        """What the passing of the deadline means for this request."""
        left = {sample.index for sample in self._samples} - self._finished
        if left <= self._waiting_for_room and self._backend.pool.lacking_since is None:
            return RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "all workers were busy until the deadline")
        details = f"the deadline passed after {sum(len(sample.entry.emitted) for sample in self._samples)} tokens"
        for sample in self._samples:
            if sample.entry.failures:
                details += f"; {sample.entry.failures}"
        return RpcFailure(grpc.StatusCode.DEADLINE_EXCEEDED, details)

    def _begin(self, samples: Sequence[Sample], *, most: int) -> None:
        """Lets samples start, or go on, in groups of `most`."""
        for start in range(0, len(samples), most):
            group = Group(samples[start : start + most], self._misfits, self._until)
            self._tasks.create_task(self._follow(group), name=f"follow {group.request_id}")

    async def _follow(self, group: Group) -> None:
        """Attempts until the group is through, or every sample of it goes on by itself."""
        pauses = backoff()
        while not await self._ended(group):
            try:
                placement = await self._place(group)
            except NoRoomTogetherError:
                self._begin(group.samples, most=len(group.samples) // 2)
                return
            cause = await self._attempt(group, placement)
            if cause is None:
                return
            if cause is Cause.BUSY:
                self._waiting_for_room |= group.indices
                await self._backend.pool.wait_for_change(next(pauses))

    async def _ended(self, group: Group) -> bool:
        """Whether a sample that is alone had its last token when its attempt, or its client's stream, broke; then it is
        finished now."""
        if len(group.samples) > 1 or (reason := group.samples[0].ended) is None:
            return False
        await self._finish(group.samples[0], reason)
        return True

    async def _place(self, group: Group) -> Placement:
        self._waiting_for_room |= group.indices
        placement = await self._backend.placer.place(group.next_search())
        self._waiting_for_room -= group.indices
        first = group.samples[0]
        first.watch.request.placed(first.entry, placement)
        return placement

    async def _attempt(self, group: Group, placement: Placement) -> Cause | None:
        """Follows an attempt. Returns why the whole group is to begin again, None when it has nothing left to do."""
        pair = placement.pair
        intakes = [Intake(sample, AttemptRecord(pair.prefill.address, pair.decode.address)) for sample in group.samples]
        for intake in intakes:
            intake.sample.entry.attempts.append(intake.record)
        again = None
        with Stay(placement, self._backend.policy) as stay:
            attempt = Attempt(
                intakes,
                placement,
                self._backend.leases,
                stay,
                stall_timeout_s=self._backend.config.stall_timeout_s,
                timeout_s=self._until - time.monotonic() + LEG_MARGIN_S,
            )
            async with contextlib.aclosing(attempt.outcomes()) as outcomes:
                async for ended in outcomes:
                    for number, outcome in ended.items():
                        await self._settle(intakes[number], placement, outcome)
                    broken = {number: end.cause for number, end in ended.items() if isinstance(end, AttemptEndedError)}
                    if len(broken) == len(intakes) and group.can_stay_together:
                        again = broken[0]  # the same for all that end in one event
                    else:
                        self._begin([group.samples[number] for number in broken], most=1)
        return again

    async def _settle(self, intake: Intake, placement: Placement, outcome: Outcome) -> None:
        if isinstance(outcome, Completed):
            await self._finish(intake.sample, outcome.reason)
        else:
            self._note(intake, placement, outcome)

    async def _finish(self, sample: Sample, reason: FinishReason) -> None:
        self._finished.add(sample.index)
        await sample.finish(reason)

    def _note(self, intake: Intake, placement: Placement, error: AttemptEndedError) -> None:
        """Keeps what the early end of an attempt tells. Raises RpcFailure when the sample may not be tried again."""
        entry, record, pair = intake.sample.entry, intake.record, placement.pair
        record.failure = str(error)
        match error.cause:
            case Cause.BUSY:
                entry.attempts.pop()  # it never began
                return
            case Cause.PREEMPTED:
                record.preempted = True
                intake.sample.watch.broke(record)
                logger.info("preempted after %d tokens", len(entry.emitted), extra=about(entry.request_id))
                return
            case Cause.MISFIT:
                self._misfits[pair.identity] = record.failure
        logger.warning("%s", entry.failures, extra=about(entry.request_id))
        self._backend.pool.suspect(*error.suspects)
        if time.monotonic() >= self._until:
            raise self.timed_out()
        if entry.failed_attempts >= self._backend.config.max_attempts and entry.ended is None:
            what = "the request" if len(self._samples) == 1 else f"sample {intake.sample.index}"
            raise RpcFailure(grpc.StatusCode.UNAVAILABLE, f"{what} failed: {entry.failures}")
        if entry.ended is None:  # else it has all its tokens
            intake.sample.watch.broke(record)
