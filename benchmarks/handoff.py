"""Throughput of the hand-off beside a bare gRPC byte stream, by KV shape, prompt length and number of streams.

    python -m benchmarks.handoff --out benchmarks/results/handoff-cpu.json

Two processes on one machine over loopback, each with an event loop and an engine's thread, as workers have. The sender
exports synthetic KV from a paged cache frame by frame, the receiver is the real decode service, which scatters it into
its own: the time is from the first export to the lease's READY. The bare stream sends messages of a frame's size, made
once, through as many channels to a receiver that throws them away; the checked one is the least that a hand-off can do
(`handoff_bare`). They take turns in every round. Prefill's compute is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.handoff_bare import send_bare
from benchmarks.handoff_peer import (
    KV_SHAPES,
    MAX_TOKENS,
    engine_config,
    kv_models,
)
from benchmarks.machine import facts
from branchline.core import DraftTree, KvPart, KvSpan
from branchline.engine.sequence import KvCaches
from branchline.engine.thread import EngineThread
from branchline.v1 import decode_pb2, decode_pb2_grpc
from branchline.wire.channels import open_channel
from branchline.wire.convert import fingerprint_to_proto, tree_to_proto
from branchline.wire.frames import MAX_FRAME_BYTES, split_span
from branchline.wire.kv_codec import KvDraft, KvMessage, Outgoing
from branchline.wire.memory import keep_large_buffers
from branchline.wire.transfer import GrpcTransport
from prefill_worker.handoff import HandoffSender
from prefill_worker.jobs import exported

#: Tokens that prefill computes at once: KV becomes available in pieces of that size.
CHUNK = 512
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Timed:
    seconds: float
    #: Seconds of processor time, both processes.
    processor: float


@dataclass(frozen=True)
class Round:
    """What took turns."""

    handoff: Timed
    bare: Timed
    checked: Timed


@dataclass
class Rig:
    """The sending side, connected to the peer."""

    address: str
    caches: KvCaches
    thread: EngineThread
    fingerprint: Any
    processes: tuple[psutil.Process, ...]
    requests: int = 0

    def processor_seconds(self) -> float:
        """Of both processes since their start."""
        times = [process.cpu_times() for process in self.processes]
        return float(sum(one.user + one.system for one in times))

    @contextlib.asynccontextmanager
    async def channels(self, streams: int) -> AsyncIterator[list[Any]]:
        channels = [open_channel(self.address, shared=False) for _ in range(streams)]
        try:
            yield channels
        finally:
            for channel in channels:
                await channel.close()

    async def handoff(self, channels: list[Any], tokens: int) -> float:
        """Seconds of one hand-off of a context of `tokens` tokens."""
        stub: Any = decode_pb2_grpc.DecodeServiceStub(channels[0])
        self.requests += 1
        reserve = decode_pb2.ReserveRequest(
            request_id=f"request-{self.requests}",
            context_length=tokens,
            max_length=tokens + 8,
            fingerprint=self.fingerprint,
            attempt=1,
        )
        lease = await stub.Reserve(reserve, timeout=TIMEOUT_S)
        header = decode_pb2.HandoffHeader(lease_id=lease.lease_id, kv_dtype="bfloat16")
        sender = HandoffSender(GrpcTransport(channels), self.address, header, self._messages(tokens), TIMEOUT_S)
        began = time.perf_counter()
        await sender.run()
        seconds = time.perf_counter() - began
        await stub.Abort(decode_pb2.AbortRequest(lease_id=lease.lease_id), timeout=TIMEOUT_S)
        return seconds

    async def bare(self, channels: list[Any], total: int, *, checked: bool) -> float:
        """Seconds of `total` bytes in messages of a frame's size."""
        began = time.perf_counter()
        await send_bare(channels, total, MAX_FRAME_BYTES, checked=checked, timeout_s=TIMEOUT_S)
        return time.perf_counter() - began

    async def _messages(self, tokens: int) -> AsyncGenerator[Outgoing]:
        """As a prefill job makes them: chunk after chunk, exported by the engine's thread."""
        geometry, index = self.caches.target_kv, 0
        blocks = list(range(1, self.caches.blocks_for(tokens) + 1))
        for start in range(0, tokens, CHUNK):
            extent = (start, min(start + CHUNK, tokens))
            whole = KvSpan(KvPart.TARGET, (0, geometry.num_layers), (0, geometry.num_kv_heads), extent)
            spans = split_span(whole, geometry.bytes_per_token // geometry.num_layers)
            async for message in exported(
                self.thread, partial(self._export, blocks), index, spans, geometry.size_of(whole)
            ):
                yield message
                index += 1
        yield decode_pb2.HandoffRequest(draft=tree_to_proto(DraftTree(), index=index, first_token=1))

    def _export(self, blocks: list[int], first: int, pieces: Sequence[KvSpan]) -> list[KvMessage]:
        kv = self.caches.target_kv
        drafts = [KvDraft(number, span, kv.size_of(span)) for number, span in enumerate(pieces, first)]
        filled = self.caches.read_into(blocks, [(draft.span, draft.data) for draft in drafts])
        return [draft.seal() for draft, _ in zip(drafts, filled, strict=True)]


@contextlib.asynccontextmanager
async def connected(shape: str, *, pin: bool) -> AsyncIterator[Rig]:
    """A rig with a peer, each on half of the cores if they are to be pinned; their caches hold one and two of the
    longest contexts."""
    models = kv_models(shape)
    cache_mib = 2 * models.target.spec.kv.bytes_per_token * (MAX_TOKENS + 512) // 2**20 + 2
    command = [sys.executable, "-m", "benchmarks.handoff_peer", shape, str(cache_mib)]
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2 if pin else 0
    os.sched_setaffinity(0, cores[half:])  # inherited
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(0, cores[:half] or cores)
    thread = EngineThread("prefill-engine")
    try:
        assert peer.stdout is not None
        assert peer.stdin is not None
        address = (await asyncio.to_thread(peer.stdout.readline)).strip()
        engine, tree = engine_config(cache_mib // 2)
        caches = KvCaches(models, engine, tree)
        caches.target.storage.normal_()
        processes = (psutil.Process(), psutil.Process(peer.pid))
        yield Rig(address, caches, thread, fingerprint_to_proto(models.fingerprint), processes)
        peer.stdin.close()
        await asyncio.to_thread(peer.wait, TIMEOUT_S)
    finally:
        await thread.stop(TIMEOUT_S)
        peer.kill()
        peer.wait()
        os.sched_setaffinity(0, cores)


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape in options.shape:
        async with connected(shape, pin=options.pin) as rig:
            per_token = rig.caches.target_kv.bytes_per_token
            for tokens in options.tokens:
                for streams in options.streams:
                    async with rig.channels(streams) as channels:
                        times = await _rounds(rig, channels, tokens, options.rounds)
                    case = {"shape": shape, "tokens": tokens, "streams": streams}
                    rows.append(case | _row(times, tokens * per_token))
                    print(line(rows[-1]), flush=True)
    return rows


async def _rounds(rig: Rig, channels: list[Any], tokens: int, rounds: int) -> list[Round]:
    """The first, which connects, is left out."""
    total = tokens * rig.caches.target_kv.bytes_per_token

    async def timed(work: Awaitable[float]) -> Timed:
        before = rig.processor_seconds()
        seconds = await work
        return Timed(seconds, rig.processor_seconds() - before)

    measured = []
    for _ in range(rounds + 1):
        handoff = await timed(rig.handoff(channels, tokens))
        bare, checked = [await timed(rig.bare(channels, total, checked=checked)) for checked in (False, True)]
        measured.append(Round(handoff, bare, checked))
    return measured[1:]


def _row(rounds: list[Round], total: int) -> dict[str, Any]:
    """Medians; ratios are the medians of the rounds' own. Processor time is the mean: its clock is coarse."""

    def speed(times: Iterable[Timed]) -> float:
        return round(total / statistics.median(one.seconds for one in times) / 1e9, 3)

    def processor(times: Iterable[Timed]) -> int:
        return round(statistics.mean(one.processor for one in times) / (total / 2**20) * 1e6)

    return {
        "mib": round(total / 2**20, 1),
        "ms": round(statistics.median(one.handoff.seconds for one in rounds) * 1000, 2),
        "gb_s": speed(one.handoff for one in rounds),
        "bare_gb_s": speed(one.bare for one in rounds),
        "checked_gb_s": speed(one.checked for one in rounds),
        "ratio": round(statistics.median(one.bare.seconds / one.handoff.seconds for one in rounds), 3),
        "checked_ratio": round(statistics.median(one.bare.seconds / one.checked.seconds for one in rounds), 3),
        "processor_us_per_mib": processor(one.handoff for one in rounds),
        "bare_processor_us_per_mib": processor(one.bare for one in rounds),
        "checked_processor_us_per_mib": processor(one.checked for one in rounds),
    }


HEAD = (
    f"{'':>14} {'':>6} {'':>7} {'':>7} {'':>8} {'GB/s':>20} {'of bare':>13} {'processor us/MiB':>20}\n"
    f"{'shape':>14} {'tokens':>6} {'streams':>7} {'MiB':>7} {'ms':>8} {'handoff':>8} {'checked':>5} {'bare':>5} "
    f"{'handoff':>6} {'check':>5} {'handoff':>8} {'checked':>5} {'bare':>5}"
)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']:>14} {row['tokens']:>6} {row['streams']:>7} {row['mib']:>7} {row['ms']:>8} "
        f"{row['gb_s']:>8} {row['checked_gb_s']:>7} {row['bare_gb_s']:>5} {row['ratio']:>7} {row['checked_ratio']:>5} "
        f"{row['processor_us_per_mib']:>8} {row['checked_processor_us_per_mib']:>7} "
        f"{row['bare_processor_us_per_mib']:>5}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Throughput of the hand-off.")
    parser.add_argument("--shape", nargs="+", choices=KV_SHAPES, default=["smollm2-135m", "llama-3.1-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pin", action="store_true", help="each process on half of the cores, as workers are")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    keep_large_buffers()
    torch.set_num_threads(1)
    print(HEAD)
    rows = asyncio.run(measure(options))
    if options.out is not None:
        settings = {"pinned": options.pin, "rounds": options.rounds, "chunk": CHUNK, "frame_bytes": MAX_FRAME_BYTES}
        result = {"machine": facts(), "settings": settings, "results": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
