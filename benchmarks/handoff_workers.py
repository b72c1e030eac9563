"""The hand-off of the default model between real workers: does it overlap with prefill, and does it arrive warm?

    python -m benchmarks.handoff_workers --out benchmarks/results/handoff-workers-cpu.json

Four things, over a prefill engine in this process and a decode worker in another, with nothing else to do:

- the timeline of a long prompt: when each chunk was computed, exported and sent, and when decode was READY, in the JSON
  and as a picture beside it. The target: READY at most a quarter of a chunk's time behind prefill's end, which is when
  the first draft tree is there;
- tokens per decode step: in the first step after the hand-off, in the later ones, and, for a comparison at the same
  place of the same text, in a step in the middle of the answer beside that step after a hand-off right there, with
  draft KV and without (a cold drafter);
- a system prompt that comes again: how many tokens are prefilled;
- a second turn of a chat: how many tokens' KV is sent, and how long it takes from its hand-off's begin to READY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.worker_rig import Recording, WorkerRig

PROMPTS = Path(__file__).parent / "data/spec_bench_dev.jsonl"
CHUNK = 512
#: READY behind prefill's end, in chunks.
TARGET = 0.25
SYSTEM_TOKENS, USER_TOKENS, ANSWER_TOKENS = 1024, 64, 24


async def timeline(rig: WorkerRig, tokens: int, rounds: int) -> tuple[dict[str, Any], Recording]:
    """Medians over rounds, after one that doesn't count, and the round whose READY was the median one."""
    from branchline.core import Request

    vocabulary, generator = rig.engine.models.target.spec.vocab_size, random.Random(0)
    recordings = []
    for number in range(rounds + 1):
        prompt = tuple(generator.randrange(vocabulary) for _ in range(tokens))
        recordings.append(await rig.run(Request(f"timeline-{number}", prompt, 4)))
    measured = sorted(recordings[1:], key=_behind)
    chosen = measured[len(measured) // 2]
    chunk = statistics.median(end - start for one in measured for start, end in one.passes)
    shares = [_behind(one) / chunk for one in measured]
    return {
        "tokens": tokens,
        "chunk": CHUNK,
        "chunk_ms": _ms(chunk),
        "ready_behind_prefill_ms": _ms(_behind(chosen)),
        "ready_behind_last_chunk_ms": _ms(statistics.median(one.ready - one.passes[-1][1] for one in measured)),
        "ready_behind_prefill_in_chunks": round(statistics.median(shares), 3),
        "by_round": [round(share, 3) for share in shares],
        "at_most": TARGET,
        "met": statistics.median(shares) <= TARGET,
        "kv_mib": round(chosen.kv_bytes / 2**20, 1),
        "sent_before_prefill_ended": round(_sent_by(chosen, chosen.passes[-1][1]), 3),
        "round_shown_ms": {
            "chunks": _bars(chosen.passes),
            "draft_tree": _bars(chosen.drafts),
            "exports": _bars(chosen.exports),
            "frames_sent": _bars([(start, end) for start, end, _ in chosen.sends]),
            "ready": _ms(chosen.ready),
        },
    }, chosen


def _behind(one: Recording) -> float:
    return one.ready - one.drafts[-1][1]


def _sent_by(one: Recording, at: float) -> float:
    """The share of the KV that gRPC had taken."""
    return sum(size for _, end, size in one.sends if end <= at) / one.kv_bytes


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def _bars(extents: Sequence[tuple[float, float]]) -> list[list[float]]:
    return [[_ms(start), _ms(end)] for start, end in extents]


async def first_steps(rig: WorkerRig, prompts: list[tuple[int, ...]], max_tokens: int) -> dict[str, Any]:
    """Tokens per step of decoding, the bonus token included."""
    from branchline.core import Request

    first, later, steady, handed, cold = [], [], [], [], []
    for number, prompt in enumerate(prompts):
        request = Request(f"warm-{number}", prompt, max_tokens)
        whole = await rig.run(request)
        sizes = [len(step) for step in whole.steps]
        first.append(sizes[0])
        later += sizes[1:-1]  # the last one may have been cut off by max_tokens
        output = [whole.first_token, *(token for step in whole.steps for token in step)]
        middle = len(sizes) // 2
        root = sum(sizes[:middle])  # the step in the middle verifies the tree on this output token
        again = replace(request, emitted=tuple(output[:root]))
        warm, without = [await rig.run(again, ship_draft=ship) for ship in (True, False)]
        if warm.first_token == without.first_token == output[root]:  # else bfloat16 has broken a tie otherwise
            steady.append(sizes[middle])
            handed.append(len(warm.steps[0]))
            cold.append(len(without.steps[0]))
        print(f"\rfirst steps: {number + 1} of {len(prompts)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    difference = [one - other for one, other in zip(handed, steady, strict=True)]
    return {
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "first_step": _mean(first),
        "later_steps": _mean(later),
        "same_place": {
            "pairs": len(steady),
            "running_on": _mean(steady),
            "after_handoff": _mean(handed),
            "after_handoff_without_draft_kv": _mean(cold),
            "difference": _mean(difference),
        },
        # Two standard errors of each of the two means.
        "within_noise": abs(statistics.mean(first) - statistics.mean(later))
        <= 2 * math.hypot(_error(first), _error(later)),
        "same_place_within_noise": abs(statistics.fmean(difference or [0])) <= 2 * _error(difference),
    }


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _mean(values: Sequence[float]) -> dict[str, float]:
    mean = round(statistics.fmean(values or [0]), 3)
    return {"mean": mean, "standard_error": round(_error(values), 3), "steps": len(values)}


async def repeated_prompt(rig: WorkerRig) -> dict[str, Any]:
    from branchline.core import Request

    vocabulary, generator = rig.engine.models.target.spec.vocab_size, random.Random(7)
    system = tuple(generator.randrange(vocabulary) for _ in range(SYSTEM_TOKENS))
    prefilled = []
    for number in range(3):
        before = rig.engine.prefilled_tokens
        user = tuple(generator.randrange(vocabulary) for _ in range(USER_TOKENS))
        await rig.run(Request(f"system-{number}", system + user, 2))
        prefilled.append(rig.engine.prefilled_tokens - before)
    once = prefilled[0] == SYSTEM_TOKENS + USER_TOKENS and set(prefilled[1:]) == {USER_TOKENS}
    return {"system_tokens": SYSTEM_TOKENS, "user_tokens": USER_TOKENS, "prefilled_tokens": prefilled, "once": once}


async def second_turn(rig: WorkerRig, rounds: int) -> dict[str, Any]:
    """A long first turn, its answer, and a short second turn behind them; medians over rounds."""
    from branchline.core import Request

    vocabulary, generator = rig.engine.models.target.spec.vocab_size, random.Random(11)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(vocabulary) for _ in range(count))

    turns: list[tuple[Recording, Recording]] = []
    lengths = []
    for number in range(rounds):
        opening = Request(f"turn-1-{number}", tokens(SYSTEM_TOKENS), ANSWER_TOKENS)
        first = await rig.run(opening, reuse=True)
        answer = (first.first_token, *(token for step in first.steps for token in step))
        reply = Request(f"turn-2-{number}", opening.prompt + answer + tokens(USER_TOKENS), ANSWER_TOKENS)
        turns.append((first, await rig.run(reply, reuse=True)))
        lengths.append(len(reply.prompt))
    held = [second.held_tokens for _, second in turns]
    mib = [round(statistics.median(turn[place].kv_bytes for turn in turns) / 2**20, 2) for place in (0, 1)]
    ready = [_ms(statistics.median(turn[place].ready for turn in turns)) for place in (0, 1)]
    return {
        "first_turn_tokens": SYSTEM_TOKENS,
        "second_turn_tokens": lengths,
        "held_tokens": held,
        "kv_mib": mib,
        "ready_ms": ready,
    }


def table(result: dict[str, Any]) -> str:
    overlap, steps, repeated = result["timeline"], result["first_steps"], result["repeated_prompt"]
    turns = result["second_turn"]
    same = steps["same_place"]

    def mean(of: dict[str, float]) -> str:
        return f"{of['mean']:.3f} ± {2 * of['standard_error']:.3f}"

    return "\n".join(
        [
            f"{overlap['tokens']} tokens in chunks of {overlap['chunk']}, {overlap['chunk_ms']} ms each: READY "
            f"{overlap['ready_behind_prefill_ms']} ms behind prefill's end, "
            f"{overlap['ready_behind_prefill_in_chunks']} chunks "
            f"(at most {overlap['at_most']}: {'yes' if overlap['met'] else 'NO'}); "
            f"{overlap['sent_before_prefill_ended']:.0%} of the KV sent before the last chunk was done",
            "tokens a step, with two standard errors:",
            f"  first step after the hand-off        {mean(steps['first_step'])}",
            f"  later steps                          {mean(steps['later_steps'])}",
            f"  a step in the middle, running on     {mean(same['running_on'])}",
            f"  the same step after a hand-off       {mean(same['after_handoff'])}",
            f"  the same without draft KV            {mean(same['after_handoff_without_draft_kv'])}",
            f"a system prompt of {repeated['system_tokens']} tokens with {repeated['user_tokens']} others behind it, "
            f"three times: {repeated['prefilled_tokens']} tokens prefilled",
            f"a first turn of {turns['first_turn_tokens']} tokens: {turns['kv_mib'][0]} MiB of KV, READY after "
            f"{turns['ready_ms'][0]} ms; the second, of {turns['second_turn_tokens'][0]} tokens with "
            f"{turns['held_tokens'][0]} of them held: {turns['kv_mib'][1]} MiB, {turns['ready_ms'][1]} ms",
        ]
    )


async def measure(options: argparse.Namespace) -> tuple[dict[str, Any], Recording]:
    from transformers import AutoTokenizer

    from benchmarks.worker_rig import workers
    from branchline.config import Config
    from branchline.engine.models.locate import locate_model

    config = Config().override(
        **{
            "model.model": options.model,
            "model.draft": options.draft,
            "model.provider": options.provider,
            "engine.kv_cache_mib": 384,
            "engine.max_model_len": options.timeline_tokens + 512,
            "engine.max_batch": 2,
            "engine.prefill_chunk_tokens": CHUNK,
            "engine.adaptive_tree": False,
            "engine.threads": 1,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(locate_model(options.model))
    prompts = []
    for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:: options.every][: options.prompts]:
        chat = [{"role": "user", "content": json.loads(line)["turns"][0]}]
        prompts.append(tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)))
    async with workers(config, lambda line: print(line, file=sys.stderr)) as rig:
        overlap, shown = await timeline(rig, options.timeline_tokens, options.rounds)
        result = {
            "timeline": overlap,
            "first_steps": await first_steps(rig, prompts, options.max_tokens),
            "repeated_prompt": await repeated_prompt(rig),
            "second_turn": await second_turn(rig, options.rounds),
        }
    return result, shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--draft", default="default")
    parser.add_argument("--provider", default="vllm")
    parser.add_argument("--timeline-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--every", type=int, default=6, help="takes one of so many questions (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="the JSON; the picture is written beside it")
    options = parser.parse_args(argv)

    from branchline.process import set_thread_environment
    from branchline.wire.memory import keep_large_buffers

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    set_thread_environment(1)
    keep_large_buffers()

    from benchmarks.machine import facts
    from benchmarks.timeline_svg import svg

    result, shown = asyncio.run(measure(options))
    print(table(result))
    if options.out is not None:
        whole = {
            "machine": facts(),
            "command": " ".join(["python -m benchmarks.handoff_workers", *(argv or sys.argv[1:])]),
        }
        options.out.write_text(json.dumps(whole | result, indent=1) + "\n", encoding="utf-8")
        lanes = [
            ("prefill: chunks", shown.passes),
            ("first draft tree", shown.drafts),
            ("export", shown.exports),
            ("frames on the stream", [(start, end) for start, end, _ in shown.sends]),
        ]
        marks = [("prefill's end", shown.drafts[-1][1]), ("READY", shown.ready)]
        title = f"{options.timeline_tokens} tokens of {options.model} in chunks of {CHUNK}"
        options.out.with_suffix(".svg").write_text(svg(title, lanes, marks), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
