"""Prefill → decode over gRPC on one machine, on the reference provider: needs neither Ray nor vLLM.

    python benchmarks/gpu/e2e.py --dtype float32 --json results.json

Starts a prefill worker, a decode worker and a gateway as plain processes, on CUDA where there is a GPU and on the
CPU otherwise, twice: with the draft tree, and with plain decoding. The same prompts go through both, one at a time and
several at once. In float32 their tokens must be equal, one by one (exit code 1 otherwise); in other dtypes the number
of equal texts is reported. Figures come out as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script from anywhere

from benchmarks.local_system import LocalSystem
from branchline.client import Client, Completion
from branchline.config import Config

PROMPTS = Path(__file__).parents[1] / "data/spec_bench_dev.jsonl"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    prompts = read_prompts(options.prompts, options.limit)
    runs = {tree: measure(options, tree, prompts) for tree in ("none", options.tree)}
    plain, drafted = runs["none"], runs[options.tree]
    equal = {
        way: sum(a.token_ids == b.token_ids for a, b in zip(plain[way][0], drafted[way][0], strict=True))
        for way in plain
    }
    report = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/gpu/e2e.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": versions(),
        "settings": {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()},
        "prompts": len(prompts),
        "equal_texts": equal,
        "results": {tree: {way: figures(*run) for way, run in ways.items()} for tree, ways in runs.items()},
        "speedup": {way: round(plain[way][1] / drafted[way][1], 3) for way in plain},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0 if options.dtype != "float32" or all(count == len(prompts) for count in equal.values()) else 1


def measure(options: argparse.Namespace, tree: str, prompts: list[str]) -> dict[str, tuple[list[Completion], float]]:
    """All prompts through one system: way -> completions and seconds."""
    config = Config().override(
        **{
            "model.model": options.model,
            "model.draft": options.draft,
            "model.dtype": options.dtype,
            "model.device": options.device,
            "model.provider": "reference",
            "model.tree": tree,
            "engine.kv_cache_mib": options.kv_cache_mib,
            "engine.max_batch": max(options.concurrency, 1),
        }
    )
    say(f"tree {tree}: starting")
    with LocalSystem(config) as system, Client(system.address) as client:

        def ask(prompt: str) -> Completion:
            return client.complete(
                messages=[{"role": "user", "content": prompt}],
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                seed=1,
                ignore_eos=options.ignore_eos,
            )

        for prompt in prompts[:2]:  # warm-up
            ask(prompt)
        ways: dict[str, tuple[list[Completion], float]] = {}
        for in_flight in dict.fromkeys((1, options.concurrency)):
            say(f"tree {tree}: {len(prompts)} prompts, {in_flight} in flight")
            began = time.monotonic()
            with ThreadPoolExecutor(in_flight) as pool:
                completions = list(pool.map(ask, prompts))
            ways[f"{in_flight} in flight"] = completions, time.monotonic() - began
        return ways


def figures(completions: list[Completion], seconds: float) -> dict[str, float]:
    tokens = sum(c.usage.completion_tokens for c in completions)
    forwards = sum(c.speculation.target_forwards for c in completions)
    accepted = sum(c.speculation.accepted for c in completions)
    decoding = sum(c.duration_s - c.time_to_first_token_s for c in completions)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "median_ttft_ms": round(1e3 * statistics.median(c.time_to_first_token_s for c in completions), 2),
        "tpot_ms": round(1e3 * decoding / max(tokens - len(completions), 1), 3),
        "acceptance_length": round((accepted + forwards) / forwards, 3) if forwards else 0.0,
    }


def read_prompts(path: Path, limit: int) -> list[str]:
    """`limit` first turns of a Spec-Bench file, spread over all of it."""
    turns = [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()]
    return turns[:: max(len(turns) // limit, 1)][:limit]


def machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return {"processor": platform.processor() or platform.machine(), "cores": cores, "gpu": gpu}


def versions() -> dict[str, str]:
    import grpc
    import torch
    import transformers

    names = {"torch": torch, "transformers": transformers, "grpc": grpc}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in names.items()}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a directory, a Hugging Face id, or default")
    parser.add_argument("--draft", default="default", help="an EAGLE-3 head's directory, or default")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tree", default="default")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, default=16, help="prompts to use")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ignore-eos", action="store_true", help="equal lengths, for speed")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--kv-cache-mib", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="where to write the report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
