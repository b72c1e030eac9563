"""One attempt at samples that share a prompt, on one pair of workers.

The decode worker's token streams are opened first, one for each sample, so that no token can be missed; then the
prefill worker is asked to compute and to ship to the first sample's lease. Until that hand-off is over all samples
share its fate; afterwards each goes its own way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

import grpc

from branchline.core import InvalidRequestError
from branchline.v1 import decode_pb2, prefill_pb2
from branchline.wire import convert
from gateway.intake import Intake
from gateway.leases import Leases, Placement
from gateway.legs import PREFILL, Ended, Legs
from gateway.outcome import AttemptEndedError, Cause, Completed, Outcome
from gateway.stay import Stay
from gateway.worker import Worker

#: Seconds that a decode worker may take to open the streams.
_ATTACH_TIMEOUT_S = 5.0
#: When the prefill worker reports that the lease has ended, the decode worker tells why: it has this many seconds.
_VERDICT_S = 0.25


class Attempt:
    """`intakes`: one for each lease of `placement`, in that order."""

    def __init__(
        self,
        intakes: Sequence[Intake],
        placement: Placement,
        leases: Leases,
        stay: Stay,
        *,
        stall_timeout_s: float,
        timeout_s: float,
    ) -> None:
        assert len(intakes) == len(placement.lease_ids)
        self._intakes = intakes
        self._placement = placement
        self._prefill = placement.pair.prefill
        self._decode = placement.pair.decode
        self._leases = leases
        self._stay = stay
        self._stall_timeout_s = stall_timeout_s
        first = intakes[0].sample
        self._context = first.entry.context
        self._legs = Legs(first.entry.request_id, timeout_s, first.watch.request.metadata)
        #: Samples that want more tokens from this attempt.
        self._live = dict(enumerate(intakes))
        #: Why the leases that are still held will be given back.
        self._held = dict.fromkeys(range(len(intakes)), "the request was cancelled")
        self._handed_off = False
        self._verdict: AttemptEndedError | None = None  # the prefill worker's, until the decode worker has had its say

    async def outcomes(self) -> AsyncGenerator[Mapping[int, Outcome]]:
        """Yields which samples have ended, and how, as it happens. Raises InvalidRequestError when the workers refuse
        the request for good.

        All calls are cancelled and all leases given back when it ends or is closed.
        """
        try:
            for sample, intake in enumerate(self._intakes):
                request = convert.request_to_proto(intake.sample.entry.next_request())
                attach = decode_pb2.AttachRequest(lease_id=self._placement.lease_ids[sample], request=request)
                self._legs.open(sample, self._decode, "Attach", attach)
            try:
                await self._attached()
            except AttemptEndedError as error:
                yield self._end_all(error)
                return
            for intake in self._intakes:
                intake.heard = self._legs.waited_s
            self._legs.open(PREFILL, self._prefill, "Prefill", self._prefill_request())
            while self._live:
                if ended := await self._step():
                    yield ended
        finally:
            for sample in tuple(self._held):  # first: the wait for the calls' end may be cut short by a cancellation
                self._give_back(sample)
            await self._legs.close()

    def _prefill_request(self) -> prefill_pb2.PrefillRequest:
        entry = self._intakes[0].sample.entry
        return prefill_pb2.PrefillRequest(
            request=convert.request_to_proto(entry.next_request()),
            decode_address=self._decode.address,
            lease_id=self._placement.lease_ids[0],
            ship_draft=self._placement.accepts_draft,
            samples=len(self._intakes),
            priority=entry.priority,
            queued_ms=entry.queued_ms,
            held_tokens=self._placement.held_tokens,
        )

    async def _attached(self) -> None:
        """Returns when every stream has begun."""
        missing = set(self._live)
        try:
            async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                while missing:
                    key, event = await self._legs.next(_ATTACH_TIMEOUT_S)
                    if isinstance(event, Ended):
                        raise _ended_error(event, self._prefill, self._decode)
                    if event.WhichOneof("event") == "preempted":  # before all had come
                        raise AttemptEndedError("preempted", cause=Cause.PREEMPTED)
                    if key not in missing or event.WhichOneof("event") != "attached":
                        raise AttemptEndedError("the stream did not begin with `attached`", self._decode)
                    missing.discard(key)
        except TimeoutError:
            raise AttemptEndedError("the token stream was not opened in time", self._decode) from None

    async def _step(self) -> Mapping[int, Outcome]:
        """Waits for one event; which samples it ends."""
        try:
            key, event = await self._legs.next(self._patience_s())
        except TimeoutError:
            return self._stalled() if self._verdict is None else self._end_all(self._verdict)
        for sample in self._live if not self._handed_off else {key} & self._live.keys():
            self._intakes[sample].heard = self._legs.waited_s
        try:
            match event:
                case prefill_pb2.PrefillResponse():
                    return await self._on_prefill(event)
                case decode_pb2.AttachResponse():
                    return await self._on_decode(key, event)
                case Ended():
                    self._on_end(key, event)
        except AttemptEndedError as error:
            return self._end(key, error) if self._handed_off else self._end_all(error)
        return {}

    async def _on_prefill(self, event: prefill_pb2.PrefillResponse) -> Mapping[int, Outcome]:
        match event.WhichOneof("event"):
            case "first_token":
                sample = event.first_token.sample
                if sample >= len(self._intakes):
                    raise AttemptEndedError(f"a first token of sample {sample}, which does not exist", self._prefill)
                self._stay.computed(event.first_token.cached_tokens)
                if sample in self._live:
                    completed = await self._intakes[sample].first_token(event.first_token, self._prefill)
                    return self._end(sample, completed) if completed else {}
            case "handed_off":
                self._note_hand_off()
        return {}

    async def _on_decode(self, sample: int, event: decode_pb2.AttachResponse) -> Mapping[int, Outcome]:
        kind = event.WhichOneof("event")
        if kind == "tokens":
            self._note_hand_off()
        if sample not in self._live:  # it was complete with its first token, or a stop string
            return {}
        completed = None
        match kind:
            case "tokens":
                completed = await self._intakes[sample].tokens(event.tokens, self._decode)
            case "finished":
                completed = self._intakes[sample].finished(event.finished, self._decode)
            case "preempted":
                raise AttemptEndedError("preempted", cause=Cause.PREEMPTED)
        return self._end(sample, completed) if completed else {}

    def _on_end(self, key: int, end: Ended) -> None:
        """Raises AttemptEndedError, or InvalidRequestError, when somebody still needs that call."""
        if key == PREFILL:
            if self._handed_off:
                return
            if end.failure and end.failure.code is grpc.StatusCode.ABORTED:
                self._verdict = _ended_error(end, self._prefill, self._decode)
                return
        elif key not in self._live:
            return
        raise _ended_error(end, self._prefill, self._decode)

    def _note_hand_off(self) -> None:
        """The decode worker has everything: from here on nobody depends on the prefill worker or another's lease."""
        if not self._handed_off:
            self._handed_off, self._verdict = True, None
            self._stay.handed_off(self._context)
            for sample in tuple(self._held.keys() - self._live.keys()):
                self._give_back(sample)

    def _end(self, sample: int, outcome: Outcome) -> dict[int, Outcome]:
        """The sample wants nothing more. Its lease is kept until the hand-off is over: the others' may depend on it."""
        intake = self._live.pop(sample, None)
        if intake is None:
            return {}
        if self._handed_off and (isinstance(outcome, Completed) or outcome.cause is Cause.PREEMPTED):
            self._stay.ended(intake.sample.entry.context)
        if isinstance(outcome, Completed):
            self._held[sample] = f"the request is complete: {outcome.reason}"
            if outcome.lease_done:
                del self._held[sample]
                self._leases.note_room()
        else:
            self._held[sample] = str(outcome)
        if self._handed_off and sample in self._held:
            self._give_back(sample)
        return {sample: outcome}

    def _end_all(self, outcome: Outcome) -> dict[int, Outcome]:
        return {sample: outcome for sample in tuple(self._live) if self._end(sample, outcome)}

    def _give_back(self, sample: int) -> None:
        self._legs.cancel(sample)
        self._leases.end(self._placement, sample, self._held.pop(sample))

    def _patience_s(self) -> float:
        """Seconds until the sample that has been silent longest counts as stalled."""
        if self._verdict is not None:
            return _VERDICT_S
        silent_s = self._legs.waited_s - min(intake.heard for intake in self._live.values())
        return max(0.0, self._stall_timeout_s - silent_s)

    def _stalled(self) -> Mapping[int, Outcome]:
        now, timeout_s = self._legs.waited_s, self._stall_timeout_s
        reason = f"no token for {timeout_s:g} s"
        if self._handed_off:
            error = AttemptEndedError(reason, self._decode)
            late = [sample for sample, intake in self._live.items() if now - intake.heard >= timeout_s]
            return {sample: error for sample in late if self._end(sample, error)}
        # Waiting for one's turn at a busy prefill worker is no stall: that one gets on with others' prompts.
        if not any(intake.started for intake in self._intakes) and self._prefill.progressed_within(timeout_s):
            for intake in self._intakes:
                intake.heard = now
            return {}
        return self._end_all(AttemptEndedError(reason, self._prefill, self._decode))


def _ended_error(end: Ended, prefill: Worker, decode: Worker) -> AttemptEndedError:
    """What the early end of a call means. Raises InvalidRequestError when the worker refuses the request for good."""
    failure = end.failure
    if failure is None:
        return AttemptEndedError(f"{end.worker.role}: the stream ended early", end.worker)
    reason = f"{end.worker.role}: {failure}"
    match failure.code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            raise InvalidRequestError(failure.details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return AttemptEndedError(reason, cause=Cause.BUSY)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return AttemptEndedError(reason, cause=Cause.MISFIT)
        case grpc.StatusCode.ABORTED:  # the lease was ended, by a hand-off that failed or to make room
            return AttemptEndedError(reason)
        case grpc.StatusCode.UNAVAILABLE if end.worker is prefill:  # it, or the decode worker as it sees it
            return AttemptEndedError(reason, prefill, decode)
        case _:
            return AttemptEndedError(reason, end.worker)
