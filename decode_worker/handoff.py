"""The receiving side of a hand-off: KV frames into the cache, the first token and the tree into the session.

One coroutine waits for whichever comes first: the next message, the oldest import, the lease's end, or the
deadline. So acknowledgements flow while the sender is silent, and memory is bounded by `WINDOW_FRAMES`.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from branchline.core import InvalidRequestError, KvPart, KvSpan
from branchline.engine.models.protocol import KvGeometry
from branchline.v1 import decode_pb2
from branchline.wire.convert import tree_from_proto
from branchline.wire.frames import DamagedFrameError, read_kv_frame
from branchline.wire.status import RpcFailure
from decode_worker.engine_loop import SequenceGoneError
from decode_worker.leases import LeaseState
from decode_worker.sessions import Session, Sessions

#: Frames of one stream that may wait for the engine at once.
WINDOW_FRAMES = 16


class HandoffReceiver:
    """One Handoff stream, from behind its header. A header that comes again is a heartbeat."""

    def __init__(
        self,
        sessions: Sessions,
        session: Session,
        requests: AsyncIterator[decode_pb2.HandoffRequest],
        stall_s: float,
    ) -> None:
        self._sessions = sessions
        self._session = session
        self._requests = requests
        self._stall_s = stall_s
        #: Frames on their way into the cache: the next index once they are in, and the import.
        self._imports: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._commit: decode_pb2.CommitFrame | None = None

    async def responses(self) -> AsyncGenerator[decode_pb2.HandoffResponse]:
        """Acknowledgements, the last of them `ready`. Ends without one when the sender closed before its commit.

        Errors that no repetition can mend abort the lease. A damaged frame doesn't: it may be sent again.
        """
        over = self._session.handoff_over
        assert over is not None
        yield decode_pb2.HandoffResponse(next_index=self._session.arrived.next_index)
        reading = asyncio.create_task(_next(self._requests))
        try:
            while not over.done():
                await self._wait(over, reading)
                if over.done():
                    break
                if (settled := self._settle()) is not None:
                    yield decode_pb2.HandoffResponse(next_index=settled)
                if self._commit is None and self._has_room and reading.done():
                    request = reading.result()
                    if request is None:
                        return
                    self._take(request)
                    if self._commit is None:
                        reading = asyncio.create_task(_next(self._requests))
                if self._commit is not None and not self._imports:
                    self._finish(self._commit)
                    yield decode_pb2.HandoffResponse(next_index=self._session.arrived.next_index, ready=True)
                    return
        except DamagedFrameError:
            raise
        except (InvalidRequestError, RpcFailure) as error:
            self._sessions.abort(self._session.lease.lease_id, f"the hand-off failed: {error}")
            raise
        finally:
            reading.add_done_callback(_seen)
            reading.cancel()
        raise over.result()

    @property
    def _has_room(self) -> bool:
        """A full window stops the reading; gRPC's flow control then holds the sender back."""
        return len(self._imports) < WINDOW_FRAMES

    async def _wait(self, over: asyncio.Future[RpcFailure], reading: asyncio.Task[Any]) -> None:
        waiting: set[asyncio.Future[Any]] = {over}
        if self._imports:
            waiting.add(self._imports[0][1])
        if self._commit is None and self._has_room:
            waiting.add(reading)
        done, _ = await asyncio.wait(waiting, timeout=self._stall_s, return_when=asyncio.FIRST_COMPLETED)
        if not done and not self._imports:  # it is the sender that is late, not the engine
            raise RpcFailure(grpc.StatusCode.ABORTED, f"the hand-off stalled for {self._stall_s:g} s")

    def _settle(self) -> int | None:
        """Takes the imports that are done off the window; the index of the frame behind the last of them."""
        settled = None
        while self._imports and self._imports[0][1].done():
            settled, imported = self._imports.popleft()
            try:
                imported.result()
            except SequenceGoneError as error:
                raise RpcFailure(grpc.StatusCode.ABORTED, str(error)) from None
        return settled

    def _take(self, request: decode_pb2.HandoffRequest) -> None:
        self._sessions.touch(self._session)
        match request.WhichOneof("part"):
            case "header":
                self.check_header(request.header)
            case "kv":
                self._take_kv(request.kv)
            case "draft":
                self._take_draft(request.draft)
            case "commit":
                self._commit = request.commit
            case _:
                raise InvalidRequestError("a hand-off request without a part")

    def check_header(self, header: decode_pb2.HandoffHeader) -> None:
        """Raises RpcFailure or InvalidRequestError when the header doesn't fit this stream and worker."""
        if header.lease_id != self._session.lease.lease_id:
            raise InvalidRequestError("a hand-off stream serves one lease only")
        ours = str(self._sessions.engine.runner.target_kv.dtype).removeprefix("torch.")
        if header.kv_dtype != ours:
            raise RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, f"kv_dtype: {ours} != {header.kv_dtype}")

    def _take_kv(self, frame: decode_pb2.KvFrame) -> None:
        span, data = read_kv_frame(frame)
        if not self._is_next(frame.index):
            return
        geometry = self._promised(span)
        expected = math.prod(span.shape(geometry.head_dim)) * geometry.dtype.itemsize
        if len(data) != expected:
            raise InvalidRequestError(f"KV frame {frame.index}: {len(data)} bytes, its span has {expected}")
        arrived = self._session.arrived
        if span.part is KvPart.TARGET:
            arrived.target_bytes += len(data)
        else:
            arrived.draft_bytes += len(data)
        arrived.next_index += 1
        engine, lease_id = self._sessions.engine, self._session.lease.lease_id
        imported = self._sessions.thread.submit_bulk(len(data), engine.import_kv, lease_id, span, data)
        imported.add_done_callback(self._on_imported)
        self._imports.append((arrived.next_index, imported))

    def _on_imported(self, imported: asyncio.Future[None]) -> None:
        """A frame that counts as arrived but isn't in the cache costs the lease, whether or not the stream lives."""
        error = None if imported.cancelled() else imported.exception()
        if error is not None:
            self._sessions.abort(self._session.lease.lease_id, f"a frame could not be taken over: {error}")

    def _take_draft(self, frame: decode_pb2.DraftFrame) -> None:
        if not self._is_next(frame.index):
            return
        arrived = self._session.arrived
        if arrived.first_token is not None:
            raise InvalidRequestError(f"frame {frame.index}: a second draft frame")
        tree = tree_from_proto(frame)
        vocabulary = self._sessions.engine.models.target.spec.vocab_size
        if max(frame.first_token, *tree.tokens, 0) >= vocabulary:
            raise InvalidRequestError(f"frame {frame.index}: a token id is not below the vocabulary size {vocabulary}")
        arrived.first_token, arrived.tree = frame.first_token, tree
        arrived.next_index += 1
        if not self._imports:
            self._imports.append((arrived.next_index, _done()))
        else:  # acknowledged together with the frame before it
            self._imports[-1] = (arrived.next_index, self._imports[-1][1])

    def _is_next(self, index: int) -> bool:
        """False for a frame that is here already. Raises InvalidRequestError when one was left out."""
        expected = self._session.arrived.next_index
        if index > expected:
            raise InvalidRequestError(f"frame {index} came when {expected} was expected")
        return index == expected

    def _promised(self, span: KvSpan) -> KvGeometry:
        """The geometry of the span's cache. Raises InvalidRequestError when the span leaves the promised range."""
        lease, runner = self._session.lease, self._sessions.engine.runner
        if span.part is KvPart.TARGET:
            geometry, tokens = runner.target_kv, (0, lease.context_length)
        elif lease.accepts_draft and runner.draft_kv is not None:
            geometry, tokens = runner.draft_kv, (1, lease.context_length + 1)
        else:
            raise InvalidRequestError("draft KV for a lease that doesn't accept any")
        bounds = {"layers": (0, geometry.num_layers), "heads": (0, geometry.num_kv_heads), "tokens": tokens}
        for name, (low, high) in bounds.items():
            start, end = getattr(span, name)
            if not low <= start < end <= high:
                raise InvalidRequestError(f"KV frame: {name} {start}..{end} are outside the promised {low}..{high}")
        return geometry

    def _finish(self, commit: decode_pb2.CommitFrame) -> None:
        """Checks that everything has come. A commit that is repeated, its answer lost, changes nothing."""
        arrived, lease, runner = self._session.arrived, self._session.lease, self._sessions.engine.runner
        came = (arrived.next_index, arrived.target_bytes + arrived.draft_bytes)
        if came != (commit.frames, commit.kv_bytes):
            raise RpcFailure(
                grpc.StatusCode.DATA_LOSS,
                f"{commit.frames} frames with {commit.kv_bytes} bytes were sent, {came[0]} with {came[1]} came",
            )
        if lease.state is not LeaseState.RECEIVING:
            return
        target_bytes = lease.context_length * runner.target_kv.bytes_per_token
        draft_bytes = lease.context_length * runner.draft_kv.bytes_per_token if runner.draft_kv else 0
        if arrived.target_bytes != target_bytes or arrived.draft_bytes not in (0, draft_bytes):
            raise RpcFailure(
                grpc.StatusCode.DATA_LOSS,
                f"the KV is not whole: {arrived.target_bytes} of {target_bytes} bytes of the target's, "
                f"{arrived.draft_bytes} of {draft_bytes} of the draft's",
            )
        if arrived.first_token is None:
            raise RpcFailure(grpc.StatusCode.DATA_LOSS, "the draft frame, with the first token, is missing")
        self._sessions.complete(self._session)


async def _next(requests: AsyncIterator[decode_pb2.HandoffRequest]) -> decode_pb2.HandoffRequest | None:
    return await anext(requests, None)


def _seen(future: asyncio.Future[Any]) -> None:
    """For futures that nobody may come to await: their error is not to be reported as forgotten."""
    if not future.cancelled():
        future.exception()


def _done() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future
