"""Plain decoding and prefill by vLLM's own CPU engine: what `benchmarks/engine.py` and `prefill.py` are held against.

    echo '{"batch": 1, "output_tokens": 32}' | python benchmarks/engine_vllm.py --context 512 --threads 2

Loads `vllm.LLM` (not our provider), says `{"ready": …}`, then answers each line of standard input with one line.
Prompts are random tokens of exactly `--context`; every request decodes `output_tokens` greedily, past any
end-of-sequence token. The clock runs from the step after which every request of the batch has its second token to the
one with which the first request ends, so start-up, prefill and a shrinking batch drop out. vLLM's scheduler and engine
core run in this process, as Branchline's decode runner does in its own (in another one they are no faster), and
nothing is detokenised. With `output_tokens` 1 it is prefill that is measured: from the first request that the engine is
given to the last one's token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere


def main() -> None:
    options = parse_options()
    # Read by vLLM and Hugging Face on import. No binding: the caller decides which cores to use.
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    engine = load(options)
    vocab_size = engine.model_config.get_vocab_size()
    print(json.dumps({"ready": versions(), "threads": threads(), "compiled": not options.eager}), file=answers)
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        prompts = random_prompts(number, order["batch"], options.context, vocab_size)
        work = prefill if order["output_tokens"] == 1 else decode
        print(json.dumps(work(engine, f"{number}", prompts, order["output_tokens"])), file=answers)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a directory, a Hugging Face id, or 'default'")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="most requests at once (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="OpenMP threads; 0 leaves it to the environment")
    parser.add_argument("--eager", action="store_true", help="without vLLM's compilation")
    return parser.parse_args()


def load(options: argparse.Namespace) -> Any:
    """vLLM's engine with nothing but the sizes set, prefix caching apart, which would skip the prompts."""
    from vllm import LLM

    from branchline.engine.models.locate import locate_model

    return LLM(
        model=str(locate_model(options.model, lambda line: print(line, file=sys.stderr))),
        dtype=options.dtype,
        enforce_eager=options.eager,
        max_num_seqs=options.batch,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        seed=0,
    ).llm_engine


def decode(engine: Any, name: str, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    """Decodes a batch; seconds and tokens of its steady part."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{index}", TokensPrompt(prompt_token_ids=prompt), sampling)
    counts: Counter[str] = Counter()
    marks: list[tuple[float, int]] = []  # when the steady part began and ended: seconds, tokens so far
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        everyone = len(counts) == len(prompts) and min(counts.values()) >= 2
        if (not marks and everyone) or (len(marks) == 1 and max(counts.values()) == output_tokens):
            marks.append((time.perf_counter(), counts.total()))
    (began, before), (ended, after) = marks
    assert counts.total() == len(prompts) * output_tokens, counts
    return {"batch": len(prompts), "tokens": after - before, "seconds": ended - began}


def prefill(engine: Any, name: str, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
    """Tokens of the prompts, and seconds until each has its first token."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{index}", TokensPrompt(prompt_token_ids=prompt), sampling)
    while engine.has_unfinished_requests():
        engine.step()
    return {"batch": len(prompts), "tokens": sum(map(len, prompts)), "seconds": time.perf_counter() - began}


def random_prompts(seed: int, batch: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(batch)]


def threads() -> int:
    import torch

    return torch.get_num_threads()


def versions() -> dict[str, str]:
    from benchmarks.acceptance_vllm import vllm_version

    return vllm_version()


if __name__ == "__main__":
    main()
