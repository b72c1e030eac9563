"""How far an iteration is from what the memory allows, and how long the device waits between two of them.

The floor is the time to read the target's weights once and the draft head's D times (its fusing projection once), at
the bandwidth that a large copy reaches on the device. Nothing can be faster at batch 1: every weight is read that
often. The gap between two CUDA graph replays is what the host's work costs that doesn't hide behind the device's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from benchmarks.engine_report import aligned, summary
from benchmarks.engine_rig import Rig
from benchmarks.engine_shapes import ForcedDraft, ForcedTarget
from branchline.engine.models.protocol import Models

TARGET_RATIO, TARGET_GAP_MEDIAN_US, TARGET_GAP_P99_US = 1.25, 30.0, 100.0
#: Not read as a whole: one row a token, or a few rows of a table.
_LOOKED_UP = ("embedding", "rotary", "target_token_ids")
_WARM_UP, _COPIES = 8, 10


def measure(models: Models, rig: Rig, context: int, steps: int, bandwidth: float) -> dict[str, Any]:
    """Milliseconds of iterations in a row at batch 1, beside the floor. `bandwidth` in bytes a second."""
    rig.place(1, context)
    rig.run(_WARM_UP)
    with replay_gaps() as gaps:
        seconds, tokens = rig.run(steps)
    floor_s = floor_bytes(models, rig.tree.depth) / bandwidth
    ratio = round(seconds / steps / floor_s, 4)
    return {
        "nodes": rig.tree.num_nodes,
        "depth": rig.tree.depth,
        "context": context,
        "steps": steps,
        "tokens_per_step": round(tokens / steps, 3),
        "ms_per_iteration": round(1e3 * seconds / steps, 4),
        "floor_ms": round(1e3 * floor_s, 4),
        "ratio": ratio,
        "at_most": TARGET_RATIO,
        "met": ratio <= TARGET_RATIO,
        "replay_gap": _gap_summary(gaps),
    }


def floor_table(by_tree: dict[str, dict[str, Any]]) -> str:
    head = ["beside the floor, ms", "nodes", "depth", "context", "tokens/step", "iteration", "floor", "ratio"]
    lines = [[*head, "gap us, median", "p99"]]
    for name, entry in by_tree.items():
        sizes = [str(entry[field]) for field in ("nodes", "depth", "context", "tokens_per_step")]
        times = [f"{entry[field]:.3f}" for field in ("ms_per_iteration", "floor_ms", "ratio")]
        us = (entry["replay_gap"] or {}).get("us", {})
        lines.append([name, *sizes, *times, *(f"{us[field]:.1f}" if us else "-" for field in ("median", "p99"))])
    return aligned(lines)


def floor_bytes(models: Models, depth: int) -> int:
    """What one iteration with a tree of `depth` levels reads of the weights at least."""
    target = models.target.inner if isinstance(models.target, ForcedTarget) else models.target
    draft = models.draft.inner if isinstance(models.draft, ForcedDraft) else models.draft
    if draft is None or depth == 0:
        return weight_bytes(target)
    fused = weight_bytes(getattr(draft, "fc", None))
    return weight_bytes(target) + fused + depth * (weight_bytes(draft) - fused)


def weight_bytes(part: Any) -> int:
    """All tensors of a reference model's layers, those aside that are looked up."""
    if isinstance(part, torch.Tensor):
        return part.nbytes
    if isinstance(part, Sequence) and not isinstance(part, str):
        return sum(map(weight_bytes, part))
    if not dataclasses.is_dataclass(part):
        return 0
    return sum(weight_bytes(getattr(part, f.name)) for f in dataclasses.fields(part) if f.name not in _LOOKED_UP)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of several copies within the device's memory."""
    size = (4 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_copy_seconds(source, target) for _ in range(_COPIES))


def _copy_seconds(source: torch.Tensor, target: torch.Tensor) -> float:
    if source.device.type != "cuda":
        began = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began
    start, end = _event(), _event()
    start.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextlib.contextmanager
def replay_gaps() -> Iterator[list[float]]:
    """Collects the microseconds from each graph replay's end to the next one's start, while it is open; the list is
    filled when it closes. Without a GPU it stays empty.

    Every replay gets an event right before and right behind it on its stream. An event on an idle stream counts from
    when the host records it, just before the replay, so a launch's own latency is not in the gap.
    """
    gaps: list[float] = []
    if not torch.cuda.is_available():
        yield gaps
        return
    replay: Callable[[torch.cuda.CUDAGraph], None] = torch.cuda.CUDAGraph.replay
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start, end = _event(), _event()
        start.record()
        replay(graph)
        end.record()
        events.append((start, end))

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", timed):
        yield gaps
    torch.cuda.synchronize()
    gaps += [1e3 * end.elapsed_time(start) for (_, end), (start, _) in itertools.pairwise(events)]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _gap_summary(gaps: list[float]) -> dict[str, Any] | None:
    if len(gaps) < 2:
        return None
    p99 = round(statistics.quantiles(gaps, n=100)[98], 2)
    us = summary(gaps) | {"p99": p99}
    limits = {"median": TARGET_GAP_MEDIAN_US, "p99": TARGET_GAP_P99_US}
    return {"us": us, "at_most": limits, "met": all(us[name] <= limit for name, limit in limits.items())}
