"""The frames of a hand-off: each is checked against what the lease promised before it counts."""

from __future__ import annotations

import asyncio

import grpc

from branchline.core import MAX_LOGPROBS, InvalidRequestError, KvPart, KvSpan
from branchline.engine.models.protocol import KvGeometry
from branchline.v1 import decode_pb2
from branchline.wire.convert import logprobs_from_proto, tree_from_proto
from branchline.wire.frames import DamagedFrameError, read_kv_frame
from branchline.wire.kv_codec import KvView
from branchline.wire.seals import intact
from branchline.wire.status import RpcFailure
from branchline.wire.transfer import MAX_AHEAD
from decode_worker.leases import LeaseState
from decode_worker.session import SampleGroup, Session
from decode_worker.sessions import Sessions


class Intake:
    """Takes one hand-off's frames in, KV into the cache and the rest into the group of samples."""

    def __init__(self, sessions: Sessions, group: SampleGroup) -> None:
        self._sessions = sessions
        self._group = group
        self._arrived = group.arrived
        self._lease = group.members[0].lease

    def check_header(self, header: decode_pb2.HandoffHeader) -> None:
        """Raises RpcFailure or InvalidRequestError when the header is damaged or doesn't fit this stream and worker."""
        if not intact(header):
            raise DamagedFrameError("a hand-off header: wrong checksum")
        if header.lease_id != self._lease.lease_id:
            raise InvalidRequestError("a hand-off stream serves one lease only")
        ours = str(self._sessions.engine.runner.target_kv.dtype).removeprefix("torch.")
        if header.kv_dtype != ours:
            raise RpcFailure(grpc.StatusCode.FAILED_PRECONDITION, f"kv_dtype: {ours} != {header.kv_dtype}")

    def take_kv(self, frame: decode_pb2.KvFrame | KvView) -> asyncio.Future[None] | None:
        """The import into the cache, under way; None for a frame that is here already.

        Raises DamagedFrameError, or InvalidRequestError for what wasn't promised.
        """
        span, data = read_kv_frame(frame)
        if self._is_here(frame.index):
            return None
        member = self._member(frame.index, frame.sample)
        geometry = self._promised(span, frame.sample)
        expected = geometry.size_of(span)
        if len(data) != expected:
            raise InvalidRequestError(f"KV frame {frame.index}: {len(data)} bytes, its span has {expected}")
        self._arrived.count(span, frame.sample, len(data), self._lease.context_length)
        self._arrived.frames.add(frame.index)
        if member.lease.state.ended:
            return _settled_at_once()
        thread, engine, lease_id = self._sessions.thread, self._sessions.engine, member.lease.lease_id
        imported = thread.submit_bulk(len(data), engine.import_kv, lease_id, span, data)
        imported.add_done_callback(self._on_imported)
        return imported

    def take_draft(self, frame: decode_pb2.DraftFrame) -> asyncio.Future[None] | None:
        """As `take_kv`, with nothing to import. Raises DamagedFrameError, InvalidRequestError."""
        if not intact(frame):
            raise DamagedFrameError(f"draft frame {frame.index}: wrong checksum")
        if self._is_here(frame.index):
            return None
        self._member(frame.index, frame.sample)
        arrived = self._arrived.samples[frame.sample]
        if arrived.first_token is not None:
            raise InvalidRequestError(f"frame {frame.index}: a second draft frame of sample {frame.sample}")
        tree = tree_from_proto(frame)
        vocabulary = self._sessions.engine.models.target.spec.vocab_size
        if max(frame.first_token, *tree.tokens, *frame.first_logprobs.top_token_ids, 0) >= vocabulary:
            raise InvalidRequestError(f"frame {frame.index}: a token id is not below the vocabulary size {vocabulary}")
        if len(frame.first_logprobs.top_token_ids) > MAX_LOGPROBS:
            raise InvalidRequestError(f"frame {frame.index}: more than {MAX_LOGPROBS} log-probabilities")
        if frame.HasField("first_logprobs"):
            arrived.logprobs = logprobs_from_proto(frame.first_logprobs)
        arrived.first_token, arrived.tree = frame.first_token, tree
        self._arrived.frames.add(frame.index)
        return _settled_at_once()

    def finish(self, commit: decode_pb2.CommitFrame) -> None:
        """All imports are done. A commit that is repeated, its answer lost, changes nothing.

        Raises RpcFailure with DATA_LOSS when something has not come.
        """
        arrived, runner = self._arrived, self._sessions.engine.runner
        came = (len(arrived.frames), arrived.kv_bytes)
        if came != (commit.frames, commit.kv_bytes):
            raise RpcFailure(
                grpc.StatusCode.DATA_LOSS,
                f"{commit.frames} frames with {commit.kv_bytes} bytes were sent, {came[0]} with {came[1]} came",
            )
        if self._lease.state is not LeaseState.RECEIVING:
            return
        missing = arrived.missing(
            self._lease.context_length, self._lease.held_tokens, runner.target_kv, runner.draft_kv
        )
        if missing is not None:
            raise RpcFailure(grpc.StatusCode.DATA_LOSS, f"the hand-off is not whole: {missing}")
        self._sessions.complete(self._group)

    def _on_imported(self, imported: asyncio.Future[None]) -> None:
        """A frame that counts as arrived but isn't in the cache costs the lease, whether or not the stream lives."""
        error = None if imported.cancelled() else imported.exception()
        if error is not None:
            self._sessions.live.abort(self._lease.lease_id, f"a frame could not be taken over: {error}")

    def _is_here(self, index: int) -> bool:
        """Whether the frame has come already. Raises InvalidRequestError when it is too far ahead."""
        frames = self._arrived.frames
        if index >= frames.next + MAX_AHEAD:
            raise InvalidRequestError(f"frame {index} came while frame {frames.next} is missing")
        return index in frames

    def _member(self, index: int, sample: int) -> Session:
        members = self._group.members
        if sample >= len(members):
            raise InvalidRequestError(f"frame {index}: sample {sample} of a reservation for {len(members)}")
        return members[sample]

    def _promised(self, span: KvSpan, sample: int) -> KvGeometry:
        """The geometry of the span's cache. Raises InvalidRequestError when the span leaves the promised range."""
        runner, context, held = self._sessions.engine.runner, self._lease.context_length, self._lease.held_tokens
        if span.part is KvPart.TARGET:
            if sample > 0:
                raise InvalidRequestError(f"target KV of sample {sample}: it shares sample 0's")
            geometry, tokens = runner.target_kv, (held, context)
        elif self._lease.accepts_draft and runner.draft_kv is not None:
            geometry, tokens = runner.draft_kv, (max(1, held) if sample == 0 else context, context + 1)
        else:
            raise InvalidRequestError("draft KV for a lease that doesn't accept any")
        bounds = {"layers": (0, geometry.num_layers), "heads": (0, geometry.num_kv_heads), "tokens": tokens}
        for name, (low, high) in bounds.items():
            start, end = getattr(span, name)
            if not low <= start < end <= high:
                raise InvalidRequestError(
                    f"KV frame of sample {sample}: {name} {start}..{end} are outside the promised {low}..{high}"
                )
        return geometry


def _settled_at_once() -> asyncio.Future[None]:
    """The import of a frame that brings nothing for the cache, or only for a sample that has ended."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future
