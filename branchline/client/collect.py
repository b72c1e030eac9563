"""The sum of a stream's parts."""

from __future__ import annotations

import time
from typing import Any, Protocol, TypeVar

from branchline.client.errors import ServerError
from branchline.client.results import Chunk, Completion, Sample, Usage
from branchline.core import FinishReason, SpeculationStats, TokenLogprobs
from branchline.v1 import gateway_pb2, types_pb2

ChunkT = TypeVar("ChunkT", covariant=True)
ResultT = TypeVar("ResultT", covariant=True)


class Collects(Protocol[ChunkT, ResultT]):
    """What a stream needs of whoever adds up its responses."""

    def add(self, response: Any, /) -> ChunkT | None: ...

    @property
    def result(self) -> ResultT | None: ...

    def received(self) -> list[gateway_pb2.ReceivedSample]: ...

    def finish(self) -> None: ...


def whole(collector: Collects[ChunkT, ResultT]) -> ResultT:
    """All of a stream. Raises RuntimeError before it has ended."""
    result = collector.result
    if result is None:
        raise RuntimeError("the stream has not come to its end")
    return result


_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class Collector:
    """Adds up the responses of one Generate call, from the moment it is made."""

    def __init__(self, samples: int = 1) -> None:
        """`samples`: how many were asked for."""
        self._started = time.monotonic()
        self._first_token_s: float | None = None
        self._samples = samples
        self._parts: dict[int, _Parts] = {}
        self._result: Completion | None = None

    def add(self, response: gateway_pb2.GenerateResponse) -> Chunk | None:
        """The response's chunk, None when it carries nothing."""
        if response.sample >= self._samples:
            raise ServerError(f"the server sent sample {response.sample}, not asked for", "INTERNAL")
        finished = response.finished if response.HasField("finished") else None
        chunk = Chunk(
            response.text,
            tuple(response.token_ids),
            response.sample,
            tuple(_logprobs(message) for message in response.logprobs),
            _finish_reason(finished.finish_reason) if finished else None,
        )
        if chunk.token_ids and self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._started
        self._parts.setdefault(chunk.sample, _Parts()).add(chunk, finished)
        if finished and sum(parts.finished is not None for parts in self._parts.values()) == self._samples:
            self._result = self._complete()
        return chunk if chunk.text or chunk.token_ids or finished else None

    @property
    def result(self) -> Completion | None:
        """None until the last response of every sample has come."""
        return self._result

    def received(self) -> list[gateway_pb2.ReceivedSample]:
        """What has come of each sample, for a request to go on behind it; empty while nothing has come of any."""
        if not self._parts:
            return []
        return [
            self._parts[number].received() if number in self._parts else gateway_pb2.ReceivedSample()
            for number in range(self._samples)
        ]

    def finish(self) -> None:
        """To be called when the stream has ended well. Raises ServerError when a last response is missing."""
        if self._result is None:
            raise ServerError("the stream ended without a result", "DATA_LOSS")

    def _complete(self) -> Completion:
        samples = tuple(self._parts[number].sample() for number in range(self._samples))
        first, message = samples[0], self._parts[0].finished
        assert message is not None
        duration = time.monotonic() - self._started
        return Completion(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            logprobs=first.logprobs,
            usage=Usage(
                prompt_tokens=message.usage.prompt_tokens,
                completion_tokens=sum(parts.completion_tokens for parts in self._parts.values()),
                cached_tokens=message.usage.cached_tokens,
            ),
            speculation=sum((sample.speculation for sample in samples), SpeculationStats()),
            seed=message.seed,
            failovers=sum(sample.failovers for sample in samples),
            preemptions=sum(sample.preemptions for sample in samples),
            samples=samples,
            time_to_first_token_s=duration if self._first_token_s is None else self._first_token_s,
            duration_s=duration,
        )


class _Parts:
    """Of one sample. `finished` is what its last response said."""

    def __init__(self) -> None:
        self.finished: gateway_pb2.Completion | None = None
        self._chunks: list[Chunk] = []

    def add(self, chunk: Chunk, finished: gateway_pb2.Completion | None) -> None:
        self._chunks.append(chunk)
        self.finished = finished or self.finished

    def received(self) -> gateway_pb2.ReceivedSample:
        ids = [token_id for chunk in self._chunks for token_id in chunk.token_ids]
        return gateway_pb2.ReceivedSample(token_ids=ids, finished=self.finished is not None)

    @property
    def completion_tokens(self) -> int:
        return self.finished.usage.completion_tokens if self.finished else 0

    def sample(self) -> Sample:
        assert self.finished is not None
        return Sample(
            text="".join(chunk.text for chunk in self._chunks),
            token_ids=tuple(token_id for chunk in self._chunks for token_id in chunk.token_ids),
            finish_reason=_finish_reason(self.finished.finish_reason),
            logprobs=tuple(logprobs for chunk in self._chunks for logprobs in chunk.logprobs),
            speculation=SpeculationStats(
                target_forwards=self.finished.speculation.target_forwards,
                drafted=self.finished.speculation.drafted,
                accepted=self.finished.speculation.accepted,
            ),
            failovers=self.finished.failovers,
            preemptions=self.finished.preemptions,
        )


def _finish_reason(value: types_pb2.FinishReason) -> FinishReason:
    reason = _FINISH_REASONS.get(value)
    if reason is None:
        raise ServerError(f"the server gave the unknown finish reason {value}", "INTERNAL")
    return reason


def _logprobs(message: types_pb2.TokenLogprobs) -> TokenLogprobs:
    if len(message.top_token_ids) != len(message.top_logprobs):
        raise ServerError("the server sent log-probabilities without their tokens", "INTERNAL")
    return TokenLogprobs(message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)))
