"""One request in the prefill worker, seen from the event loop: its events, and the messages of its hand-off."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import grpc

from branchline.core import DraftTree, KvPart, KvSpan, Request
from branchline.engine.blocks import OutOfBlocksError
from branchline.engine.models.protocol import KvGeometry
from branchline.engine.thread import EngineThread
from branchline.v1 import decode_pb2
from branchline.wire.convert import tree_to_proto
from branchline.wire.frames import split_span
from branchline.wire.kv_codec import KvMessage, Outgoing, kv_message
from branchline.wire.status import RpcFailure
from prefill_worker.engine_loop import Computed, Drafted, Event, Failed, FirstToken, PrefillLoop

#: Bytes that one command to the engine exports. A part of the window, so that one part is sent while the next is
#: exported.
EXPORT_BYTES = 4 << 20
#: Such commands at once: with the window, what a hand-off may hold in memory.
EXPORTS_AHEAD = 4
#: More than such a command takes, and less than most steps.
EXPORT_S = 0.003


@dataclass(frozen=True, slots=True)
class Shipment:
    """What of a request's KV goes to the decode worker: that of the first `held_tokens` tokens is there already."""

    samples: int = 1
    drafts: bool = True
    held_tokens: int = 0


class PrefillJob:
    """Created for one request; `release` must be called in the end, whatever happened, also to `begin`. `rank` is its
    place among those that wait, see `core.rank_of`."""

    def __init__(
        self,
        job_id: int,
        request: Request,
        shipment: Shipment,
        rank: float,
        thread: EngineThread,
        engine: PrefillLoop,
    ) -> None:
        self._id = job_id
        self._request = request
        self._samples = shipment.samples
        self._held = shipment.held_tokens
        self._draft_kv = engine.runner.draft_kv if shipment.drafts and request.draft_nodes != 0 else None
        self._rank = rank
        self._thread = thread
        self._engine = engine
        self._events: asyncio.Queue[Computed | Drafted | Failed] = asyncio.Queue()
        #: Each sample's first token as soon as it is chosen, however far the hand-off is.
        self.first: list[asyncio.Future[FirstToken | Failed]] = [
            asyncio.get_running_loop().create_future() for _ in range(shipment.samples)
        ]

    @property
    def request_id(self) -> str:
        return self._request.request_id

    async def begin(self) -> None:
        """Takes blocks and queues the computation. Raises InvalidRequestError, or RpcFailure when blocks are short."""
        drafts = self._draft_kv is not None
        try:
            await self._thread.submit(
                self._engine.begin, self._id, self._request, self._samples, drafts, self._rank, self._on_engine_event
            )
        except OutOfBlocksError as error:
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None

    def release(self) -> asyncio.Future[None]:
        """Stops the computation and frees the blocks, after the commands submitted so far."""
        return self._thread.submit(self._engine.release, self._id)

    async def messages(self) -> AsyncGenerator[Outgoing]:
        """The hand-off's frames in order, each as soon as what it carries is computed. Ends without a commit.

        Raises RpcFailure when the engine lost the job. To be called once.
        """
        frames = 0
        async for message in self._context():
            yield message
            frames += 1
        numbers = itertools.count(frames)
        for _ in range(self._samples):
            match await self._events.get():
                case Drafted(sample, tree, row):
                    yield decode_pb2.HandoffRequest(draft=self._draft_frame(next(numbers), sample, tree))
                    if row is not None:
                        yield kv_message(next(numbers), *row, sample=sample)
                case Failed(reason):
                    raise failure(reason)
                case Computed():
                    raise AssertionError("a chunk behind the last one")

    async def _context(self) -> AsyncGenerator[KvMessage]:
        """What the samples share, and the decode worker hasn't: the target's KV of the context, and the draft rows in
        front of its end."""
        length, computed, frames = len(self._request.context), 0, 0
        while computed < length:
            match await self._events.get():
                case Computed(start, computed):
                    start, target_kv = max(start, self._held), self._engine.runner.target_kv
                    async for piece in self._export(KvPart.TARGET, target_kv, start, computed, frames):
                        yield piece
                        frames += 1
                case Failed(reason):
                    raise failure(reason)
                case Drafted():
                    raise AssertionError("a tree before the last chunk")
        if self._draft_kv is not None:
            async for piece in self._export(KvPart.DRAFT, self._draft_kv, max(1, self._held), length, frames):
                yield piece

    def _draft_frame(self, index: int, sample: int, tree: DraftTree) -> decode_pb2.DraftFrame:
        first = self.first[sample].result()
        assert isinstance(first, FirstToken), "a tree without a first token"
        choice = first.choice
        return tree_to_proto(tree, index=index, first_token=choice.token_id, sample=sample, logprobs=choice.logprobs)

    async def _export(
        self, part: KvPart, geometry: KvGeometry, start: int, end: int, first: int
    ) -> AsyncGenerator[KvMessage]:
        """The frames of a part's tokens [start, end), numbered from `first`; nothing when there are none."""
        if start >= end:
            return
        whole = KvSpan(part, (0, geometry.num_layers), (0, geometry.num_kv_heads), (start, end))
        spans = split_span(whole, geometry.bytes_per_token // geometry.num_layers)
        whole_bytes = geometry.size_of(whole)
        async for message in exported(self._thread, partial(self._engine.export, self._id), first, spans, whole_bytes):
            yield message

    def _on_engine_event(self, event: Event) -> None:
        """On the engine's thread."""
        self._thread.deliver(self._on_event, event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, FirstToken):
            self.first[event.sample].set_result(event)
            return
        if isinstance(event, Failed):
            for first in self.first:
                if not first.done():
                    first.set_result(event)
        self._events.put_nowait(event)


async def exported(
    thread: EngineThread,
    export: Callable[[int, Sequence[KvSpan]], list[KvMessage]],
    first: int,
    spans: Sequence[KvSpan],
    whole_bytes: int,
) -> AsyncGenerator[KvMessage]:
    """The frames of `spans`, of `whole_bytes` in all, numbered from `first`; `export` makes some of them on the thread.

    While the engine computes, several commands wait for it: a chunk leaves at one border between two steps, not a part
    at each. While it doesn't, there is one at a time: frames that nobody sends yet only fall out of the caches.
    """
    # All pieces but the last ones are about the same size: a command takes a number of them.
    batch = max(1, len(spans) * EXPORT_BYTES // whole_bytes)
    waiting: deque[asyncio.Future[list[KvMessage]]] = deque()
    try:
        for at in range(0, len(spans), batch):
            # Not a bulk command: there are few at a time, and a cancellation behind them shouldn't wait for a chunk.
            waiting.append(thread.submit(export, first + at, spans[at : at + batch]))
            while waiting and (len(waiting) == EXPORTS_AHEAD or await _soon(waiting[0])):
                for message in await waiting.popleft():
                    yield message
        while waiting:
            for message in await waiting.popleft():
                yield message
    finally:
        for export_under_way in waiting:
            export_under_way.cancel()


async def _soon(command: asyncio.Future[list[KvMessage]]) -> bool:
    """Whether the engine is at commands, and not in a step."""
    done, _ = await asyncio.wait({command}, timeout=EXPORT_S)
    return bool(done)


def failure(reason: str) -> RpcFailure:
    """What the gateway is told when the engine lost a job: another attempt may do better."""
    return RpcFailure(grpc.StatusCode.ABORTED, reason)
