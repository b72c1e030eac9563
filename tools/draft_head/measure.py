"""Trees side by side in the engine, one request at a time: tokens for each target forward and for each second."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from branchline.config import EngineConfig
from branchline.core import Request, SpeculationStats
from branchline.engine.execute import Executor, Tensors, executor_for
from branchline.engine.models.protocol import Models
from branchline.engine.offline import HandedOff, Pipeline
from branchline.engine.tree import TreeTopology

Program = Callable[..., Tensors]


@dataclass(frozen=True)
class Tally:
    """Sums over requests. `tokens` are those of the decode loop, without each request's first; `seconds` are the
    loop's too. `lengths[n]` counts forwards that emitted n + 1 tokens; by category: forwards and accepted tokens."""

    forwards: int = 0
    accepted: int = 0
    seconds: float = 0.0
    lengths: tuple[int, ...] = ()
    categories: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        longest = max(len(self.lengths), len(other.lengths))
        padded = [(*lengths, *[0] * (longest - len(lengths))) for lengths in (self.lengths, other.lengths)]
        categories = dict(self.categories)
        for name, (forwards, accepted) in other.categories.items():
            before = categories.get(name, (0, 0))
            categories[name] = (before[0] + forwards, before[1] + accepted)
        return Tally(
            self.forwards + other.forwards,
            self.accepted + other.accepted,
            self.seconds + other.seconds,
            tuple(one + two for one, two in zip(*padded, strict=True)),
            categories,
        )

    @property
    def tokens(self) -> int:
        return self.forwards + self.accepted

    @property
    def acceptance_length(self) -> float:
        return SpeculationStats(self.forwards, 0, self.accepted).acceptance_length

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def by_depth(self) -> list[float]:
        """The share of forwards that accepted at least one drafted token, at least two, …"""
        return [round(sum(self.lengths[depth:]) / max(self.forwards, 1), 4) for depth in range(1, len(self.lengths))]

    def figures(self) -> dict[str, Any]:
        """What an evaluation reports of it."""
        by_category = {
            name: round(SpeculationStats(forwards, 0, accepted).acceptance_length, 3)
            for name, (forwards, accepted) in sorted(self.categories.items())
        }
        return {
            "acceptance_length": round(self.acceptance_length, 4),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "forwards": self.forwards,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 2),
            "by_depth": self.by_depth,
            "by_category": by_category,
        }


class LengthCounter:
    """An Executor that counts iterations by the number of tokens they emit. On the device and without a host read, so
    that it costs next to nothing where iterations are pipelined."""

    def __init__(self, depth: int, device: torch.device, inner: Executor) -> None:
        #: int64 `[depth + 2]`; entry 0 counts rows without a request.
        self._counts = torch.zeros(depth + 2, dtype=torch.int64, device=device)
        self._inner = inner

    def __call__(self, key: Hashable, program: Program, *inputs: torch.Tensor) -> Tensors:
        outputs = self._inner(key, program, *inputs)
        self._counts.index_add_(0, outputs[1], torch.ones_like(outputs[1]))
        return outputs

    def take(self) -> list[int]:
        """Iterations that emitted 1, 2, … tokens since the last call."""
        counts: list[int] = self._counts.tolist()
        self._counts.zero_()
        return counts[1:]


class Meter(Pipeline):
    """Runs requests one after the other and times the decode loop; prefill is left out."""

    def __init__(self, models: Models, tree: TreeTopology, engine: EngineConfig) -> None:
        self._lengths = LengthCounter(tree.depth, models.device, executor_for(models.device, engine.max_batch))
        super().__init__(models, tree, engine, executor=self._lengths)
        self._prefill_s = 0.0

    def hand_off(self, *arguments: Any, **named: Any) -> HandedOff:
        began = time.perf_counter()
        try:
            return super().hand_off(*arguments, **named)
        finally:
            self._prefill_s += time.perf_counter() - began

    def measure(self, requests: Sequence[tuple[Request, str]]) -> Tally:
        """Requests with their categories; ids must be unique."""
        self._prefill_s = 0.0
        self._lengths.take()
        began = time.perf_counter()
        outputs = self.run([request for request, _ in requests])
        seconds = time.perf_counter() - began - self._prefill_s
        total = Tally(seconds=seconds, lengths=tuple(self._lengths.take()))
        for request, category in requests:
            stats = outputs[request.request_id].stats
            sums = (stats.target_forwards, stats.accepted)
            total += Tally(*sums, categories={category: sums})
        assert sum(total.lengths) == total.forwards, "iterations were counted that nobody asked for"
        return total
