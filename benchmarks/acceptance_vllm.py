"""Mean acceptance length of vLLM's own engine with an EAGLE-3 head: the figure that ours is held against.

    python benchmarks/acceptance_vllm.py --prompts spec_bench.jsonl --limit 40

Runs `vllm.LLM` (not our provider) with method `eagle3` and a chain of drafts, greedily, over the first turns of a file
in Spec-Bench's format (`question_id`, `category`, `turns`), each formatted by the model's chat template with a
generation prompt. Prints one JSON object. The counters are vLLM's own; a step is one target forward of one request
that verified a draft, and emits the accepted tokens and one more. `mean_acceptance_length` counts tokens accepted past
the end of a request too, as vLLM does; `emitted_per_step` only those that were put out, without the prefill's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    options = parse_options()
    # Read by vLLM and Hugging Face on import. No binding: the caller decides which cores to use.
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    from branchline.engine.models.locate import locate_draft, locate_model

    model = locate_model(options.model, lambda line: print(line, file=sys.stderr))
    draft = locate_draft(options.draft, options.model)
    if draft is None:
        sys.exit("no draft head: name one with --draft")
    questions = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    result = measure(options, model, draft, [question["turns"][0] for question in questions][: options.limit])
    print(json.dumps(result, indent=2))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="a jsonl file in Spec-Bench's format")
    parser.add_argument("--limit", type=int, help="take the first prompts only")
    parser.add_argument("--model", default="default", help="a directory, a Hugging Face id, or 'default'")
    parser.add_argument("--draft", default="default", help="likewise")
    parser.add_argument("--chain", type=int, default=3, help="drafted tokens a step (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens a request (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="requests at once; changes the speed only (%(default)s)")
    return parser.parse_args()


def measure(options: argparse.Namespace, model: Path, draft: Path, turns: list[str]) -> dict[str, Any]:
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams, TokensPrompt

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [encode(tokenizer, turn) for turn in turns]
    llm = LLM(
        model=str(model),
        dtype=options.dtype,
        enforce_eager=True,
        max_num_seqs=options.batch,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={"method": "eagle3", "model": str(draft), "num_speculative_tokens": options.chain},
    )
    started = time.monotonic()
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=options.max_tokens),
        use_tqdm=False,
    )
    seconds = time.monotonic() - started
    counters = {metric.name: int(getattr(metric, "value", 0)) for metric in llm.get_metrics()}
    steps, drafted, accepted = (
        counters[f"vllm:spec_decode_num_{name}"] for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "mean_acceptance_length": round((steps + accepted) / steps, 4),
        "emitted_per_step": round((output_tokens - len(prompts)) / steps, 4),
        "steps": steps,
        "drafted": drafted,
        "accepted": accepted,
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": output_tokens,
        "seconds": round(seconds, 1),
        "settings": {name: str(value) for name, value in vars(options).items() if name != "prompts"},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")} | vllm_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    }


def encode(tokenizer: Any, turn: str) -> list[int]:
    """A user's turn in the chat template, with the template's own system prompt where it has one."""
    messages = [{"role": "user", "content": turn}]
    token_ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return token_ids


def vllm_version() -> dict[str, str]:
    """The CPU build is a package of its own."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return {package: importlib.metadata.version(package)}
        except importlib.metadata.PackageNotFoundError:
            continue
    return {}


if __name__ == "__main__":
    main()
