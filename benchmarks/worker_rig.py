"""A prefill engine in this process and a decode worker in another one, each on a core of its own where there are two;
hand-offs between them, with what happened when.

The decode worker is the real one, started as `python -m decode_worker`. Of the prefill worker everything but its server
runs here, so that its passes and messages can be timed by the clock that also sees the decode worker's answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.local_system import Process
from branchline.config import Config
from branchline.core import Request
from branchline.engine.assemble import assemble
from branchline.engine.hosting import Host, hosted_engine
from branchline.engine.prefill import PrefillRunner
from branchline.v1 import decode_pb2, decode_pb2_grpc
from branchline.wire.channels import open_channel
from branchline.wire.convert import fingerprint_to_proto, request_to_proto
from branchline.wire.kv_codec import KvMessage, Outgoing
from branchline.wire.transfer import GrpcTransport, Stream
from prefill_worker.engine_loop import PrefillLoop
from prefill_worker.handoff import HandoffSender
from prefill_worker.jobs import PrefillJob, Shipment

TIMEOUT_S = 60.0
LOAD_S = 300.0

#: Seconds since the hand-off began, from and to.
Extent = tuple[float, float]


@dataclass
class Recording:
    """One request: what was computed, exported and sent when, and the tokens of each decode step."""

    began: float = field(default_factory=time.perf_counter)
    #: Leading tokens of the context that the decode worker had already.
    held_tokens: int = 0
    passes: list[Extent] = field(default_factory=list)
    drafts: list[Extent] = field(default_factory=list)
    exports: list[Extent] = field(default_factory=list)
    sends: list[tuple[float, float, int]] = field(default_factory=list)
    ready: float = 0.0
    first_token: int = -1
    steps: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def kv_bytes(self) -> int:
        """Sent, of target and draft head."""
        return sum(size for *_, size in self.sends)

    def now(self) -> float:
        return time.perf_counter() - self.began


@dataclass(eq=False)
class _RecordingTransport:
    inner: GrpcTransport
    recording: Recording

    @property
    def streams(self) -> int:
        return self.inner.streams

    def open(self, number: int, metadata: Sequence[tuple[str, str]] = ()) -> Stream:
        return _RecordingStream(self.inner.open(number, metadata), self.recording)


@dataclass(eq=False)
class _RecordingStream:
    inner: Stream
    recording: Recording

    async def send(self, message: Outgoing) -> None:
        began = self.recording.now()
        await self.inner.send(message)
        if isinstance(message, KvMessage):
            self.recording.sends.append((began, self.recording.now(), message.kv_bytes))

    async def receive(self) -> decode_pb2.HandoffResponse:
        response = await self.inner.receive()
        if response.ready and not self.recording.ready:
            self.recording.ready = self.recording.now()
        return response

    def close(self) -> None:
        self.inner.close()


class WorkerRig:
    def __init__(self, host: Host[PrefillLoop], address: str, channel: Any) -> None:
        self.engine = host.engine
        self._thread = host.thread
        self._address = address
        self._transport = GrpcTransport([channel])
        self._stub: Any = decode_pb2_grpc.DecodeServiceStub(channel)
        self._numbers = itertools.count()
        self._recording = Recording()
        runner: Any = self.engine.runner
        runner.advance_many = self._timed(runner.advance_many, lambda: self._recording.passes)
        runner.draft = self._timed(runner.draft, lambda: self._recording.drafts)
        engine: Any = self.engine
        engine.export = self._timed(engine.export, lambda: self._recording.exports)

    async def run(self, request: Request, *, ship_draft: bool = True, reuse: bool = False) -> Recording:
        """Prefill, hand-off and decoding of one request to its end, with nothing else under way. `reuse`: the decode
        worker may take what it still has of the context, and keeps this one's."""
        lease = await self._reserve(request, reuse)
        lease_id = lease.lease_id
        tokens = self._stub.Attach(
            decode_pb2.AttachRequest(lease_id=lease_id, request=request_to_proto(request)), timeout=TIMEOUT_S
        )
        assert (await tokens.read()).WhichOneof("event") == "attached"
        recording = self._recording = Recording(held_tokens=lease.held_tokens)
        shipment = Shipment(drafts=ship_draft, held_tokens=lease.held_tokens)
        job = PrefillJob(next(self._numbers), request, shipment, 0.0, self._thread, self.engine)
        try:
            await job.begin()
            dtype = str(self.engine.runner.target_kv.dtype).removeprefix("torch.")
            header = decode_pb2.HandoffHeader(lease_id=lease_id, kv_dtype=dtype)
            transport = _RecordingTransport(self._transport, recording)
            await HandoffSender(transport, self._address, header, job.messages(), TIMEOUT_S).run()
            await _collect(tokens, recording)
        finally:
            await job.release()
        return recording

    async def _reserve(self, request: Request, reuse: bool) -> decode_pb2.ReserveResponse:
        ask = decode_pb2.ReserveRequest(
            request_id=f"{request.request_id}-{next(self._numbers)}",
            context_length=len(request.context),
            max_length=request.max_length,
            fingerprint=fingerprint_to_proto(self.engine.models.fingerprint),
            attempt=1,
            wait_ms=10_000,
            context=request.context if reuse else (),
        )
        lease: decode_pb2.ReserveResponse = await self._stub.Reserve(ask, timeout=TIMEOUT_S)
        return lease

    def _timed(self, function: Callable[..., Any], extents: Callable[[], list[Extent]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._recording.now()
            try:
                return function(*args, **kwargs)
            finally:
                extents().append((began, self._recording.now()))

        return timed


async def _collect(tokens: Any, recording: Recording) -> None:
    """The first token comes by itself, then one message for each step."""
    while (response := await tokens.read()) is not grpc.aio.EOF:
        if response.WhichOneof("event") != "tokens":
            continue
        if recording.first_token < 0:
            [recording.first_token] = response.tokens.token_ids
        else:
            recording.steps.append(tuple(response.tokens.token_ids))


@contextlib.asynccontextmanager
async def workers(config: Config, progress: Callable[[str], None]) -> AsyncIterator[WorkerRig]:
    """Both loaded; the decode worker gets the first core, this process keeps the others."""

    def build() -> PrefillLoop:
        models, tree = assemble(config, progress)
        return PrefillLoop(models, PrefillRunner(models, config.engine, tree), config.engine.prefill_chunk_tokens)

    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="branchline-") as directory:
        os.sched_setaffinity(0, cores[:1])  # inherited
        process = Process("decode_worker", config, Path(directory), "decode")
        os.sched_setaffinity(0, cores[1:] or cores)
        try:
            async with hosted_engine("prefill-engine", build, asyncio.Event()) as host:
                assert host is not None
                address = await asyncio.to_thread(process.address, LOAD_S)
                async with open_channel(address) as channel:
                    yield WorkerRig(host, address, channel)
        finally:
            process.stop()
            os.sched_setaffinity(0, cores)
