"""One sample on its way to the client: what was emitted goes into the journal, and becomes responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from branchline.core import FinishReason
from branchline.v1 import gateway_pb2, types_pb2
from branchline.wire import convert
from gateway.journal import JournalEntry
from gateway.output import Output
from gateway.watch import SampleWatch

#: Sends a response to the client. Calls from several tasks at once must be safe.
Write = Callable[[gateway_pb2.GenerateResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Sample `index` of a Generate call, over all of its attempts."""

    index: int
    entry: JournalEntry
    output: Output
    write: Write
    watch: SampleWatch

    def replay(self) -> gateway_pb2.GenerateResponse:
        """Takes up what the client has of an earlier stream, which isn't written again: the response is for those who
        follow the text. To be called once, before anything else.
        """
        piece = self.output.push(self.entry.emitted)
        del self.entry.emitted[len(piece.token_ids) :]
        return gateway_pb2.GenerateResponse(sample=self.index, text=piece.text, token_ids=piece.token_ids)

    async def deliver(self, token_ids: Sequence[int], logprobs: Sequence[types_pb2.TokenLogprobs]) -> bool:
        """Takes new tokens; returns True when they complete a stop string, so that no more are wanted.

        `logprobs` are as many as `token_ids`, or none; what a stop string cuts off is cut off there, too.
        """
        piece = self.output.push(token_ids)
        self.entry.record(piece.token_ids)
        self.watch.tokens(len(piece.token_ids))
        await self.write(
            gateway_pb2.GenerateResponse(
                sample=self.index,
                text=piece.text,
                token_ids=piece.token_ids,
                logprobs=logprobs[: len(piece.token_ids)],
            )
        )
        return self.output.stopped

    @property
    def ended(self) -> FinishReason | None:
        """Set when what was emitted is all, though no worker has said so."""
        return FinishReason.STOP if self.output.stopped else self.entry.ended

    async def finish(self, reason: FinishReason) -> None:
        """Writes the last response."""
        entry = self.entry
        text, reason = self.output.finish(reason)
        self.watch.finished(reason)
        completion = gateway_pb2.Completion(
            finish_reason=convert.finish_reason_to_proto(reason),
            usage=gateway_pb2.Usage(
                prompt_tokens=len(entry.prompt),
                completion_tokens=len(entry.emitted),
                cached_tokens=entry.cached_tokens,
            ),
            speculation=convert.speculation_to_proto(entry.speculation),
            seed=entry.sampling.seed,
            failovers=entry.failovers,
            preemptions=entry.preemptions,
        )
        await self.write(gateway_pb2.GenerateResponse(sample=self.index, text=text, finished=completion))
