"""Time of one layer's attention, write and gather included, beside PyTorch's scaled_dot_product_attention.

    python -m benchmarks.attention --out benchmarks/results/attention-cpu.json
    python -m benchmarks.attention --device cuda --heads 32 --kv-heads 8 --head-dim 128 --context 512 8192 131072

Microseconds per layer over a cache of several layers, taken in turn. The queries are a random tree's nodes behind the
context (from 64 on, a prompt's chunk). A sequence's blocks lie side by side (`--blocks ordered`), as they mostly do in
a server, or anywhere (`--blocks random`). Each figure is the least of several medians, since other work on a machine
only adds. `sdpa` is what stands to reason without a kernel of one's own: write, gather, one call with a mask.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from branchline.engine.attention import PagedAttention
from branchline.engine.cache import BlockTables, PagedKvCache, slots_of
from branchline.engine.models.protocol import KvGeometry
from branchline.engine.tree import topology_tensors
from branchline.engine.visibility import Visibility

BLOCK_SIZE, CHUNK_FROM = 16, 64


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    print(f"{'dtype':>9} {'batch':>5} {'queries':>7} {'context':>7} {'engine µs':>10} {'sdpa µs':>10}")
    for dtype in options.dtype:
        for batch in options.batch:
            for context in options.context:
                for queries in options.queries:
                    case = Case(options, getattr(torch, dtype), batch, queries, context, device)
                    engine, sdpa = (
                        measure(run, device, options.rounds) / options.layers for run in (case.engine, case.sdpa)
                    )
                    shape = {"dtype": dtype, "batch": batch, "queries": queries, "context": context}
                    rows.append(shape | {"engine_us": round(engine, 1), "sdpa_us": round(sdpa, 1)})
                    print(f"{dtype:>9} {batch:>5} {queries:>7} {context:>7} {engine:>10.1f} {sdpa:>10.1f}", flush=True)
    if options.out is not None:
        settings = {
            name: getattr(options, name) for name in ("layers", "heads", "kv_heads", "head_dim", "blocks", "rounds")
        }
        result = {"machine": machine(device), "settings": settings | {"block_size": BLOCK_SIZE}, "results": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


class Case:
    """The tensors of one line of the table."""

    def __init__(
        self,
        options: argparse.Namespace,
        dtype: torch.dtype,
        batch: int,
        queries: int,
        context: int,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        width = -(-(context + queries) // BLOCK_SIZE)
        self.layers = options.layers
        geometry = KvGeometry(self.layers, options.kv_heads, options.head_dim, dtype)
        self.cache = PagedKvCache(geometry, batch * width, BLOCK_SIZE, device)
        self.cache.storage.normal_()
        count = batch * width
        order = torch.arange(count) if options.blocks == "ordered" else torch.randperm(count, generator=generator)
        self.table = (order + 1).view(batch, width).to(device)
        self.base = torch.full((batch,), context, device=device)
        parents = torch.arange(-1, queries - 1)
        if queries < CHUNK_FROM:
            parents = (torch.rand(queries, generator=generator) * torch.arange(queries)).long()
            parents[0] = -1
        self.depths, self.ancestors = (part.to(device) for part in topology_tensors(parents[None], queries))
        self.offsets = torch.arange(queries, device=device)[None]
        self.batch, self.queries = batch, queries
        heads = options.heads + 2 * options.kv_heads
        projected = torch.randn(batch * queries, heads, options.head_dim, device=device, dtype=dtype)
        self.parts = torch.split(projected, [options.heads, options.kv_heads, options.kv_heads], 1)

    def engine(self) -> Callable[[], None]:
        attention = PagedAttention.over(
            self.cache,
            BlockTables(self.table),
            self.base,
            torch.zeros_like(self.base),
            self.ancestors,
            self.offsets,
            torch.ones_like(self.offsets, dtype=torch.bool),
            depths=self.depths,
        )

        def run() -> None:
            for layer in range(self.layers):
                attention.attend(layer, *self.parts)

        return run

    def sdpa(self) -> Callable[[], None]:
        query, key, value = self.parts
        visibility = Visibility.of(
            self.base, torch.zeros_like(self.base), self.ancestors, self.offsets, self.depths.expand(self.batch, -1)
        )
        mask = visibility.bias(self.table.shape[1] * BLOCK_SIZE, None, query.dtype)[:, None]
        places = self.cache.places(slots_of(self.table, self.base[:, None] + self.offsets, BLOCK_SIZE).reshape(-1))
        by_head = query.view(self.batch, self.queries, *query.shape[1:]).transpose(1, 2)

        def run() -> None:
            for layer in range(self.layers):
                self.cache.write(layer, places, key, value)
                gathered = self.cache.gather(layer, self.table.reshape(-1), self.batch)
                keys, values = gathered.view(2, -1, self.batch, *gathered.shape[2:]).transpose(1, 2)
                F.scaled_dot_product_attention(by_head, keys, values, attn_mask=mask, enable_gqa=True)

        return run


def measure(prepare: Callable[[], Callable[[], None]], device: torch.device, rounds: int) -> float:
    """Microseconds of all layers: the least median of `rounds` rounds, each of about a tenth of a second."""
    run = prepare()
    run()
    medians = []
    for _ in range(rounds):
        times: list[float] = []
        end = time.perf_counter() + 0.1
        while len(times) < 5 or time.perf_counter() < end:
            times.append(once(run, device))
        medians.append(statistics.median(times))
    return min(medians) * 1e6


def once(run: Callable[[], None], device: torch.device) -> float:
    """Seconds, by the device's clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--queries", nargs="+", type=int, default=[1, 6, 17], help="a tree's nodes, or a chunk's tokens"
    )
    parser.add_argument("--context", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4, help="more than a processor's cache holds show its memory")
    parser.add_argument("--blocks", default="ordered", choices=["ordered", "random"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; 0 leaves them as PyTorch has them")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
