"""Acceptance length: tokens emitted per target forward, by tree, over the same prompts.

    python -m benchmarks.acceptance --tree chain:3 --tree default --limit 40

Runs the engine in this process, without gRPC. benchmarks/acceptance_vllm.py gives vLLM's own count for chains.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).parent / "data/spec_bench_dev.jsonl"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

    from transformers import AutoTokenizer

    from branchline.config import Config
    from branchline.core import Request, SamplingParams
    from branchline.engine.assemble import assemble
    from branchline.engine.models.locate import locate_model
    from branchline.engine.tree_spec import parse_tree

    config = Config().override(
        **{
            "model.model": options.model,
            "model.draft": options.draft,
            "model.dtype": options.dtype,
            "model.provider": options.provider,
            "engine.max_batch": options.in_flight,
        }
    )
    questions = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines()][: options.limit]
    tokenizer = AutoTokenizer.from_pretrained(locate_model(options.model))

    def encode(turn: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": turn}]
        ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return tuple(ids)

    models, _ = assemble(config, lambda line: print(line, file=sys.stderr))
    requests = [
        Request(
            str(question["question_id"]),
            encode(question["turns"][0]),
            options.max_tokens,
            SamplingParams(options.temperature, seed=1),
            stop_token_ids=models.target.spec.eos_token_ids,
        )
        for question in questions
    ]
    categories = {str(question["question_id"]): question["category"] for question in questions}
    report: dict[str, Any] = {
        "command": "python -m benchmarks.acceptance " + " ".join(sys.argv[1:] if argv is None else argv),
        "prompts": len(requests),
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "trees": {},
    }
    for tree in options.tree or ["chain:3", "default"]:
        report["trees"][tree] = measure(
            models, parse_tree(tree), config.engine, requests, categories, options.in_flight
        )
        print(f"{tree}: {report['trees'][tree]}", file=sys.stderr)
    print(json.dumps(report, indent=2))
    return 0


def measure(
    models: Any, tree: Any, engine: Any, requests: list[Any], categories: dict[str, str], in_flight: int
) -> dict[str, Any]:
    """Runs all requests; sums tokens and forwards over all of them, and by category."""
    from benchmarks.offline import Pipeline
    from branchline.core import SpeculationStats

    began = time.monotonic()
    outputs = Pipeline(models, tree, engine).run(requests, in_flight)
    seconds = time.monotonic() - began
    by_category: dict[str, SpeculationStats] = defaultdict(SpeculationStats)
    for name, output in outputs.items():
        by_category[categories[name]] += output.stats
    total = sum(by_category.values(), SpeculationStats())
    return {
        "nodes": tree.num_nodes,
        "acceptance_length": round(total.acceptance_length, 4),
        "forwards": total.target_forwards,
        "tokens": sum(len(output.token_ids) for output in outputs.values()),
        "seconds": round(seconds, 1),
        "by_category": {name: round(stats.acceptance_length, 3) for name, stats in sorted(by_category.items())},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--provider", default="vllm", choices=["vllm", "reference"])
    parser.add_argument("--tree", action="append", help="may be repeated; default: chain:3 and default")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a Spec-Bench file")
    parser.add_argument("--limit", type=int, default=40, help="the first prompts of the file")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--in-flight", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
