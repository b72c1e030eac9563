"""What a sample takes from an attempt: each token once and in order, whoever reports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from branchline.core import FinishReason, InvalidRequestError
from branchline.v1 import decode_pb2, prefill_pb2, types_pb2
from branchline.wire import convert
from gateway.journal import AttemptRecord
from gateway.outcome import AttemptEndedError, Completed
from gateway.sample import Sample
from gateway.worker import Worker


class Intake:
    """One sample's part in one attempt. Both workers report the first token; the output index tells.

    `heard` belongs to the attempt: the moment of the last event for this sample, on the attempt's clock.
    """

    def __init__(self, sample: Sample, record: AttemptRecord) -> None:
        self.sample = sample
        self.record = record
        self.heard = 0.0
        self._entry = sample.entry
        self._start = len(sample.entry.emitted)  # output index of the token that prefill samples

    @property
    def started(self) -> bool:
        """Whether this attempt has given a token."""
        return len(self._entry.emitted) > self._start

    async def first_token(self, event: prefill_pb2.FirstToken, source: Worker) -> Completed | None:
        if not self._entry.emitted:
            self._entry.cached_tokens = min(event.cached_tokens, len(self._entry.prompt))
        logprobs = [event.logprobs] if event.HasField("logprobs") else []
        if completed := await self._take(self._start, [event.token_id], logprobs, source):
            return completed
        reason = _finish_reason(event.finish_reason, source)
        return Completed(reason) if reason else None

    async def tokens(self, event: decode_pb2.Tokens, source: Worker) -> Completed | None:
        before, self.record.speculation = self.record.speculation, convert.speculation_from_proto(event.speculation)
        self.sample.watch.speculated(before, self.record.speculation)
        return await self._take(event.index, event.token_ids, event.logprobs, source)

    def finished(self, event: decode_pb2.Finished, source: Worker) -> Completed:
        reason = _finish_reason(event.reason, source)
        if reason is None or not self._entry.emitted:
            raise AttemptEndedError("the decode worker finished without a reason or a token", source)
        return Completed(reason, lease_done=True)

    async def _take(
        self, index: int, token_ids: Sequence[int], logprobs: Sequence[types_pb2.TokenLogprobs], source: Worker
    ) -> Completed | None:
        """Delivers what is new of tokens from output index `index` on."""
        emitted = self._entry.emitted
        known = len(emitted) - index
        if known < 0:
            raise AttemptEndedError(f"tokens {len(emitted)} to {index - 1} are missing", source)
        if list(token_ids[:known]) != emitted[index : index + len(token_ids)]:
            raise AttemptEndedError(f"token {index} and following came twice, and differ", source)
        if len(logprobs) != (0 if self._entry.logprobs is None else len(token_ids)):
            raise AttemptEndedError(f"{len(token_ids)} tokens came with {len(logprobs)} log-probabilities", source)
        new = token_ids[known:]
        if len(emitted) + len(new) > self._entry.max_tokens:
            raise AttemptEndedError(f"more tokens than max_tokens, {self._entry.max_tokens}", source)
        stopped = await self.sample.deliver(new, logprobs[known:]) if new else False
        return Completed(FinishReason.STOP) if stopped else None


def _finish_reason(value: Any, source: Worker) -> FinishReason | None:
    try:
        return convert.finish_reason_from_proto(value)
    except InvalidRequestError as error:
        raise AttemptEndedError(str(error), source) from error
