"""Acceptance length: tokens emitted per target forward, by tree, over the same prompts.

    python -m benchmarks.acceptance --tree chain:3 --tree default --limit 40
    python -m benchmarks.acceptance --temperature 0.7 --temperature 1.0 --draft-noise both

Runs the engine in this process, without gRPC. benchmarks/acceptance_vllm.py gives vLLM's own count for chains. Each
prompt has a seed of its own, the same in every run, so that runs at one temperature sample the same texts (but for
near-ties in 16 bits). `--draft-noise off` ranks drafts without the sampler's noise, by the draft head's logits alone:
a switch of this benchmark only, to show what the shared noise gains.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

PROMPTS = Path(__file__).parent / "data/spec_bench_dev.jsonl"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

    from transformers import AutoTokenizer

    from benchmarks import machine
    from branchline.config import Config
    from branchline.core import Request, SamplingParams
    from branchline.engine.assemble import assemble
    from branchline.engine.models.locate import locate_draft, locate_model
    from branchline.engine.tree_spec import resolve_tree

    config = Config().override(
        **{
            "model.model": options.model,
            "model.draft": options.draft,
            "model.dtype": options.dtype,
            "model.provider": options.provider,
            "engine.max_batch": options.in_flight,
        }
    )
    lines = options.prompts.read_text(encoding="utf-8").splitlines()[:: options.every]
    questions = [json.loads(line) for line in lines[: options.limit]]
    tokenizer = AutoTokenizer.from_pretrained(locate_model(options.model))

    def encode(turn: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": turn}]
        ids: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return tuple(ids)

    models, _ = assemble(config, lambda line: print(line, file=sys.stderr))
    prompts = {str(question["question_id"]): encode(question["turns"][0]) for question in questions}

    def requests(temperature: float) -> list[Request]:
        stop = models.target.spec.eos_token_ids
        return [
            Request(name, prompt, options.max_tokens, SamplingParams(temperature, seed=seed), stop_token_ids=stop)
            for seed, (name, prompt) in enumerate(prompts.items())
        ]

    categories = {str(question["question_id"]): question["category"] for question in questions}
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.acceptance", *(sys.argv[1:] if argv is None else argv)]),
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts.values())),
        "max_tokens": options.max_tokens,
        "dtype": options.dtype,
        "machine": machine.facts(),
        "runs": [],
    }
    head = locate_draft(options.draft, options.model)
    for tree in options.tree or ["chain:3", "default"]:
        for temperature in options.temperature or [0.0]:
            for noise in (True, False) if options.draft_noise == "both" else (options.draft_noise == "on",):
                with drafting_noise(noise):
                    topology = resolve_tree(tree, lambda: head)
                    result = measure(
                        models, topology, config.engine, requests(temperature), categories, options.in_flight
                    )
                run = {"tree": tree, "temperature": temperature, "draft_noise": noise} | result
                report["runs"].append(run)
                print(run, file=sys.stderr)
    report["gain_of_noise"] = gains(report["runs"])
    print(json.dumps(report, indent=2))
    return 0


@contextmanager
def drafting_noise(on: bool) -> Iterator[None]:
    """Whether drafts are ranked with the sampler's noise, as they are outside of this benchmark."""
    if on:
        yield
        return
    import torch

    from branchline.engine import draft

    def without_noise(logits: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.log_softmax(logits, -1)

    with mock.patch.object(draft, "draft_scores", without_noise):
        yield


def gains(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each tree and temperature that ran both ways: acceptance length with the noise, without, and their ratio."""
    lengths = {(run["tree"], run["temperature"], run["draft_noise"]): run["acceptance_length"] for run in runs}
    return [
        {
            "tree": tree,
            "temperature": temperature,
            "with": length,
            "without": without,
            "ratio": round(length / without, 4),
        }
        for (tree, temperature, noise), length in lengths.items()
        if noise and (without := lengths.get((tree, temperature, False)))
    ]


def measure(
    models: Any, tree: Any, engine: Any, requests: list[Any], categories: dict[str, str], in_flight: int
) -> dict[str, Any]:
    """Runs all requests; sums tokens and forwards over all of them, and by category."""
    from branchline.core import SpeculationStats
    from branchline.engine.offline import Pipeline

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
    parser.add_argument("--limit", type=int, default=40, help="the first prompts of the file (%(default)s)")
    parser.add_argument("--every", type=int, default=1, help="take every so many of the file, which is in categories")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, action="append", help="may be repeated; default: 0, greedy")
    parser.add_argument("--draft-noise", default="on", choices=["on", "off", "both"])
    parser.add_argument("--in-flight", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
