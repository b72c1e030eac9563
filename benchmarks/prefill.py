"""Prefill here and in vLLM's own engine, turn by turn in the same run, on the same cores with as many threads.

    python -m benchmarks.prefill --threads 1 --out benchmarks/results/prefill-cpu.json

A batch of random prompts, from the first one that an engine is given to the last one's first token: ours by the prefill
worker's loop, chunk by chunk, with the draft head's rows (which vLLM has none of) and without a draft head; vLLM's as
`engine_vllm.py` says. Nothing is in a prefix cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from branchline.config import Config
    from prefill_worker.engine_loop import PrefillLoop

TARGET = 0.95


def our_tokens_per_second(loop: PrefillLoop, prompts: list[tuple[int, ...]]) -> float:
    """Until every prompt has its first token; the first trees are drafted afterwards."""
    from branchline.core import Request
    from prefill_worker.engine_loop import Event, FirstToken

    chosen = 0

    def on_event(event: Event) -> None:
        nonlocal chosen
        chosen += isinstance(event, FirstToken)

    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        request = Request(f"prompt-{number}", prompt, max_tokens=8)
        loop.begin(number, request, 1, loop.runner.draft_kv is not None, float(number), on_event)
    while chosen < len(prompts):
        assert loop.step()
    seconds = time.perf_counter() - began
    while loop.step():  # the trees
        pass
    for number in range(len(prompts)):
        loop.release(number)
    return sum(map(len, prompts)) / seconds


def loops(config: Config) -> dict[str, PrefillLoop]:
    from branchline.engine.assemble import assemble
    from branchline.engine.prefill import PrefillRunner
    from branchline.engine.tree_spec import parse_tree
    from prefill_worker.engine_loop import PrefillLoop

    models, tree = assemble(config, lambda line: print(line, file=sys.stderr))
    budget = config.engine.prefill_chunk_tokens
    plain = parse_tree("none")
    return {
        "with_draft_head": PrefillLoop(models, PrefillRunner(models, config.engine, tree), budget),
        "without": PrefillLoop(models, PrefillRunner(models, config.engine, plain), budget),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.engine_plain import VllmEngine
    from branchline.config import Config

    config = Config().override(
        **{
            "model.model": options.model,
            "model.provider": options.provider,
            "engine.kv_cache_mib": 512,
            "engine.max_model_len": options.tokens + 64,
            "engine.prefix_caching": False,
            "engine.prefill_chunk_tokens": options.chunk,
            "engine.compile": options.compile,
        }
    )
    ours = loops(config)
    vocabulary = ours["without"].models.target.spec.vocab_size
    generator = random.Random(0)
    speeds: dict[str, list[float]] = {name: [] for name in (*ours, "vllm")}
    with VllmEngine(
        model=options.model,
        dtype=config.model.dtype,
        context=options.tokens,
        max_batch=options.batch,
        threads=options.threads,
        eager=not options.compile,
    ) as vllm:
        for number in range(options.rounds + 1):
            print(f"round {number} of {options.rounds}", file=sys.stderr)
            for name, loop in ours.items():
                prompts = [
                    tuple(generator.randrange(vocabulary) for _ in range(options.tokens)) for _ in range(options.batch)
                ]
                speeds[name].append(our_tokens_per_second(loop, prompts))
            speeds["vllm"].append(vllm.tokens_per_second(options.batch, 1))
        settings = vllm.settings
    return {"vllm": settings, "compiled": options.compile, "rows": [_row(name, speeds) for name in ours]}


def _row(name: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of the rounds behind the first one, and of their own ratios."""
    ratios = [ours / theirs for ours, theirs in zip(speeds[name][1:], speeds["vllm"][1:], strict=True)]
    return {
        "ours": name,
        "tokens_per_second": round(statistics.median(speeds[name][1:]), 1),
        "vllm_tokens_per_second": round(statistics.median(speeds["vllm"][1:]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "at_least": TARGET,
        "met": statistics.median(ratios) >= TARGET,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--provider", default="vllm")
    parser.add_argument("--tokens", type=int, default=1024, help="of each prompt (%(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=512, help="engine.prefill_chunk_tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each engine (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="both models compiled, as vLLM's engine is by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)

    from branchline.process import set_thread_environment

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    set_thread_environment(options.threads)

    from benchmarks.machine import facts

    result = measure(options)
    for row in result["rows"]:
        print(
            f"{row['ours']:>16}: {row['tokens_per_second']} tokens/s, vLLM {row['vllm_tokens_per_second']}, ratio "
            f"{row['ratio']} (at least {row['at_least']}: {'yes' if row['met'] else 'NO'})"
        )
    if options.out is not None:
        command = " ".join(["python -m benchmarks.prefill", *(sys.argv[1:] if argv is None else argv)])
        sizes = {"tokens": options.tokens, "batch": options.batch, "chunk": options.chunk, "rounds": options.rounds}
        whole = {"machine": facts(), "command": command, "settings": sizes}
        options.out.write_text(json.dumps(whole | result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
