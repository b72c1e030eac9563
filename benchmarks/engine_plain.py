"""Plain decoding here and in vLLM's own engine, turn by turn in the same run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.engine_report import aligned
from benchmarks.engine_rig import ROOM, Rig

SCRIPT = Path(__file__).with_name("engine_vllm.py")


class VllmEngine:
    """`benchmarks/engine_vllm.py` in a process of its own; it sleeps while it isn't asked. A context manager."""

    def __init__(self, *, model: str, dtype: str, context: int, max_batch: int, threads: int, eager: bool) -> None:
        """Raises RuntimeError when it doesn't come up."""
        sizes = ["--context", str(context), "--batch", str(max_batch), "--threads", str(threads)]
        flags = ["--model", model, "--dtype", dtype, *sizes, *(["--eager"] if eager else [])]
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.settings = self._answer()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tokens_per_second(self, batch: int, output_tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"batch": batch, "output_tokens": output_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return float(answer["tokens"]) / float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{SCRIPT.name} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def our_tokens_per_second(rig: Rig, batch: int, context: int, output_tokens: int) -> float:
    """The same work: from the second token of `output_tokens` behind a prompt to the last."""
    assert output_tokens < ROOM, output_tokens
    rig.place(batch, context)
    rig.step()
    seconds, tokens = rig.run(output_tokens - 2)
    return tokens / seconds


def compare(
    rig: Rig,
    vllm: VllmEngine,
    *,
    batches: list[int],
    context: int,
    output_tokens: int,
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Tokens per second of both, by batch size: medians of rounds that take turns, after one that doesn't count."""
    results = []
    for batch in batches:
        ours, theirs = [], []
        for number in range(rounds + 1):
            progress(f"plain decoding, batch {batch}, round {number} of {rounds}")
            ours.append(our_tokens_per_second(rig, batch, context, output_tokens))
            theirs.append(vllm.tokens_per_second(batch, output_tokens))
        ratios = [round(a / b, 4) for a, b in zip(ours[1:], theirs[1:], strict=True)]
        ratio = statistics.median(ratios)
        entry = {
            "batch": batch,
            "branchline_tokens_per_second": round(statistics.median(ours[1:]), 2),
            "vllm_tokens_per_second": round(statistics.median(theirs[1:]), 2),
            "ratio": ratio,
            "ratios": ratios,
        }
        results.append(entry | {"at_least": 1.0, "met": ratio >= 1.0})
    sizes = {"prompt_tokens": context, "output_tokens": output_tokens, "rounds": rounds}
    return sizes | {"vllm": vllm.settings, "by_batch": results}


def plain_table(comparison: dict[str, Any]) -> str:
    lines = [["plain decoding, tokens/s", "batch", "Branchline", "vLLM", "ratio", "at least", "met"]]
    for entry in comparison["by_batch"]:
        speeds = [f"{entry[name]:.2f}" for name in ("branchline_tokens_per_second", "vllm_tokens_per_second")]
        ratios = [f"{entry[name]:.3f}" for name in ("ratio", "at_least")]
        lines.append(["", str(entry["batch"]), *speeds, *ratios, "yes" if entry["met"] else "NO"])
    return aligned(lines)
