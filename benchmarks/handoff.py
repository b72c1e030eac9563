"""Throughput of the hand-off beside a bare gRPC byte stream, by KV shape, prompt length and number of streams.

    python -m benchmarks.handoff --out benchmarks/results/handoff-cpu.json

Two processes on one machine over loopback, each with an event loop and an engine's thread, as workers have. The sender
exports synthetic KV from a paged cache frame by frame, the receiver is the real decode service, which scatters it into
its own: the time is from the first export to the lease's READY. The bare stream sends messages of a frame's size, made
once, through as many channels to a receiver that throws them away; both take turns in every round. Prefill's compute is
not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.handoff_peer import (
    BARE_METHOD,
    BARE_SERVICE,
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
from branchline.wire.frames import MAX_FRAME_BYTES, kv_request, split_span
from branchline.wire.memory import keep_large_buffers
from branchline.wire.transfer import GrpcTransport
from prefill_worker.handoff import HandoffSender
from prefill_worker.jobs import EXPORT_BYTES

#: Tokens that prefill computes at once: KV becomes available in pieces of that size.
CHUNK = 512
TIMEOUT_S = 60.0


@dataclass
class Rig:
    """The sending side, connected to the peer."""

    address: str
    caches: KvCaches
    thread: EngineThread
    fingerprint: Any
    requests: int = 0

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
        stubs: list[Any] = [decode_pb2_grpc.DecodeServiceStub(channel) for channel in channels]
        self.requests += 1
        reserve = decode_pb2.ReserveRequest(
            request_id=f"request-{self.requests}",
            context_length=tokens,
            max_length=tokens + 8,
            fingerprint=self.fingerprint,
            attempt=1,
        )
        lease = await stubs[0].Reserve(reserve, timeout=TIMEOUT_S)
        header = decode_pb2.HandoffHeader(lease_id=lease.lease_id, kv_dtype="bfloat16")
        sender = HandoffSender(GrpcTransport(stubs), self.address, header, self._messages(tokens), TIMEOUT_S)
        began = time.perf_counter()
        await sender.run()
        seconds = time.perf_counter() - began
        await stubs[0].Abort(decode_pb2.AbortRequest(lease_id=lease.lease_id), timeout=TIMEOUT_S)
        return seconds

    async def bare(self, channels: list[Any], total: int) -> float:
        """Seconds of `total` bytes in messages of a frame's size."""
        messages = max(1, round(total / MAX_FRAME_BYTES))
        payload = bytes(total // messages)
        shares = [messages // len(channels) + (number < messages % len(channels)) for number in range(len(channels))]
        began = time.perf_counter()
        await asyncio.gather(*(_bare(channel, payload, share) for channel, share in zip(channels, shares, strict=True)))
        return time.perf_counter() - began

    async def _messages(self, tokens: int) -> AsyncGenerator[decode_pb2.HandoffRequest]:
        """As a prefill job makes them: chunk after chunk, exported by the engine's thread."""
        geometry, index = self.caches.target_kv, 0
        blocks = list(range(1, self.caches.blocks_for(tokens) + 1))
        for start in range(0, tokens, CHUNK):
            extent = (start, min(start + CHUNK, tokens))
            whole = KvSpan(KvPart.TARGET, (0, geometry.num_layers), (0, geometry.num_kv_heads), extent)
            spans = split_span(whole, geometry.bytes_per_token // geometry.num_layers)
            batch = max(1, len(spans) * EXPORT_BYTES // (geometry.bytes_per_token * (extent[1] - extent[0])))
            for at in range(0, len(spans), batch):
                pieces = spans[at : at + batch]
                exported = await self.thread.submit(self._export, blocks, pieces)
                for piece, data in zip(pieces, exported, strict=True):
                    yield kv_request(index, piece, data)
                    index += 1
        yield decode_pb2.HandoffRequest(draft=tree_to_proto(DraftTree(), index=index, first_token=1))

    def _export(self, blocks: list[int], pieces: list[KvSpan]) -> list[bytes]:
        return [self.caches.read(blocks, piece) for piece in pieces]


async def _bare(channel: Any, payload: bytes, messages: int) -> None:
    call = channel.stream_stream(f"/{BARE_SERVICE}/{BARE_METHOD}")(timeout=TIMEOUT_S)
    answers = asyncio.create_task(_drain(call))
    for _ in range(messages):
        await call.write(payload)
    await call.done_writing()
    await answers


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


@contextlib.asynccontextmanager
async def connected(shape: str) -> AsyncIterator[Rig]:
    """A rig with a peer; their caches hold one and two of the longest contexts."""
    models = kv_models(shape)
    cache_mib = 2 * models.target.spec.kv.bytes_per_token * (MAX_TOKENS + 512) // 2**20 + 2
    command = [sys.executable, "-m", "benchmarks.handoff_peer", shape, str(cache_mib)]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    thread = EngineThread("prefill-engine")
    try:
        assert peer.stdout is not None
        assert peer.stdin is not None
        address = (await asyncio.to_thread(peer.stdout.readline)).strip()
        engine, tree = engine_config(cache_mib // 2)
        caches = KvCaches(models, engine, tree)
        caches.target.storage.normal_()
        yield Rig(address, caches, thread, fingerprint_to_proto(models.fingerprint))
        peer.stdin.close()
        await asyncio.to_thread(peer.wait, TIMEOUT_S)
    finally:
        await thread.stop(TIMEOUT_S)
        peer.kill()
        peer.wait()


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape in options.shape:
        async with connected(shape) as rig:
            per_token = rig.caches.target_kv.bytes_per_token
            for tokens in options.tokens:
                for streams in options.streams:
                    async with rig.channels(streams) as channels:
                        times = await _rounds(rig, channels, tokens, options.rounds)
                    case = {"shape": shape, "tokens": tokens, "streams": streams}
                    rows.append(case | _row(times, tokens * per_token))
                    print(line(rows[-1]), flush=True)
    return rows


async def _rounds(rig: Rig, channels: list[Any], tokens: int, rounds: int) -> list[tuple[float, float]]:
    """(hand-off, bare) of each round; the first, which connects, is left out."""
    total = tokens * rig.caches.target_kv.bytes_per_token
    times = [(await rig.handoff(channels, tokens), await rig.bare(channels, total)) for _ in range(rounds + 1)]
    return times[1:]


def _row(times: list[tuple[float, float]], total: int) -> dict[str, Any]:
    handoff, bare = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "mib": round(total / 2**20, 1),
        "ms": round(handoff * 1000, 2),
        "gb_s": round(total / handoff / 1e9, 3),
        "bare_gb_s": round(total / bare / 1e9, 3),
        "ratio": round(statistics.median(b / h for h, b in times), 3),
    }


HEAD = f"{'shape':>14} {'tokens':>6} {'streams':>7} {'MiB':>7} {'ms':>8} {'GB/s':>6} {'bare':>6} {'ratio':>6}"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']:>14} {row['tokens']:>6} {row['streams']:>7} {row['mib']:>7} {row['ms']:>8} {row['gb_s']:>6} "
        f"{row['bare_gb_s']:>6} {row['ratio']:>6}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Throughput of the hand-off.")
    parser.add_argument("--shape", nargs="+", choices=KV_SHAPES, default=["smollm2-135m", "llama-3.1-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    keep_large_buffers()
    torch.set_num_threads(1)
    print(HEAD)
    rows = asyncio.run(measure(options))
    if options.out is not None:
        settings = {"rounds": options.rounds, "chunk": CHUNK, "frame_bytes": MAX_FRAME_BYTES}
        result = {"machine": facts(), "settings": settings, "results": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
