"""A decode runner whose contexts are made up, at exact lengths, so that its iterations can be timed phase by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from branchline.config import EngineConfig
from branchline.core import DraftTree, KvPart, KvSpan, Request
from branchline.engine.decode import Allocation, DecodeRunner
from branchline.engine.execute import EagerExecutor
from branchline.engine.models.protocol import KvGeometry, Models
from branchline.engine.sequence import MIB
from branchline.engine.tree import TreeTopology

PHASES = ("verify", "accept", "rewind", "draft", "host")
#: Rows behind the longest context: what a sequence may decode before it is placed anew, and a tree.
ROOM = 512
_FILL_ROWS = 128


@dataclass(frozen=True)
class Timing:
    """One iteration: milliseconds in all and by phase, and the tokens that came out of it."""

    total: float
    phases: dict[str, float]
    emitted: int


class Rig:
    """A runner, its whole cache filled with random rows. The rows' values don't change how long anything takes.

    Releasing a sequence and placing it again gives it blocks that are filled already, so a context of any length is
    there at no cost. Phases are those of eager iterations: with `phases` CUDA graphs are off, and on CUDA each phase is
    waited for; without, the runner works as it does in a worker.
    """

    def __init__(self, models: Models, tree: TreeTopology, max_batch: int, max_context: int, phases: bool = True):
        self.tree = tree
        self._device = models.device
        self._vocab_size = models.target.spec.vocab_size
        rows = max_context + ROOM
        config = EngineConfig(
            max_batch=max_batch, max_model_len=rows, kv_cache_mib=_cache_mib(models, tree, rows, max_batch)
        )
        options = {"executor": EagerExecutor(), "pipelined": False} if phases else {}
        self.runner = DecodeRunner(models, config, tree, **options)  # type: ignore[arg-type]
        self.allocations: list[Allocation] = []
        self._marks: list[tuple[str, float]] = []
        if phases:
            self.runner.iteration(tree.num_nodes).observe = self._mark
        self._fill(max_batch, max_context)

    def place(self, batch: int, context: int) -> None:
        """`batch` sequences of `context` tokens in the cache each, without a drafted tree yet."""
        for allocation in self.allocations:
            self.runner.release(allocation)
        prompt = tuple(range(1, 1 + min(context, self._vocab_size - 1)))
        prompt = (prompt * -(-context // len(prompt)))[:context]
        request = Request("benchmark", prompt, ROOM - 1)
        self.allocations = []
        for index in range(batch):
            (allocation,) = self.runner.allocate(context, context + ROOM - 1, rank=float(index))
            self.runner.start(allocation, request, 1 + index, DraftTree(), has_draft_kv=True)
            self.allocations.append(allocation)

    def run(self, steps: int) -> tuple[float, int]:
        """Iterations one after the other, as a worker runs them: seconds and tokens."""
        self._synchronize()
        began = time.perf_counter()
        tokens = sum(len(result.token_ids) for _ in range(steps) for result in self.runner.step().results)
        self._synchronize()
        seconds = time.perf_counter() - began
        assert self.runner.running == len(self.allocations), "a sequence came to its end"
        return seconds, tokens

    def step(self) -> Timing:
        """One timed iteration."""
        self._marks.clear()
        began = self._now()
        step = self.runner.step()
        ended = self._now()
        assert not step.preempted
        return Timing(
            1e3 * (ended - began),
            {name: 1e3 * seconds for name, seconds in self._phases(began, ended)},
            sum(len(result.token_ids) for result in step.results),
        )

    def at(self, batch: int, context: int) -> Timing:
        """The iteration at a context of `context` tokens, up to the depth of the tree more: places, lets one iteration
        draft a tree, and times the next."""
        self.place(batch, context - 1)
        self.step()
        return self.step()

    def _mark(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _phases(self, began: float, ended: float) -> Iterator[tuple[str, float]]:
        """The marks say when a phase ended, "launch" when the host's first part did."""
        if not self._marks:
            return
        ends = dict(self._marks)
        before = ends["launch"]
        for phase in PHASES[:-1]:
            yield phase, ends[phase] - before
            before = ends[phase]
        yield "host", (ends["launch"] - began) + (ended - before)

    def _fill(self, batch: int, context: int) -> None:
        """Random rows in every block, through the same door as a hand-off's."""
        parts = {KvPart.TARGET: self.runner.target_kv, KvPart.DRAFT: self.runner.draft_kv}
        end = context + ROOM // 2
        allocations = [self.runner.allocate(end, end + 1, rank=float(index))[0] for index in range(batch)]
        for part, kv in parts.items():
            if kv is None:
                continue
            data = _random_rows(kv)
            for allocation in allocations:
                for start in range(0, end - _FILL_ROWS + 1, _FILL_ROWS):
                    rows = (start, start + _FILL_ROWS)
                    span = KvSpan(part, (0, kv.num_layers), (0, kv.num_kv_heads), rows)
                    self.runner.import_kv(allocation, span, data)
        for allocation in allocations:
            self.runner.release(allocation)


def _random_rows(kv: KvGeometry) -> bytes:
    shape = (kv.num_layers, 2, _FILL_ROWS, kv.num_kv_heads, kv.head_dim)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(kv.dtype)
    return rows.view(torch.uint8).numpy().tobytes()


def _cache_mib(models: Models, tree: TreeTopology, rows: int, batch: int) -> int:
    """Room for `batch` sequences of `rows` tokens, their headroom included."""
    draft = models.draft.spec.kv.bytes_per_token if models.draft is not None and tree.num_nodes else 0
    per_row = models.target.spec.kv.bytes_per_token + draft
    headroom = 3 * (tree.num_nodes + tree.draft_rows + 2) + 64
    return -(-per_row * batch * (rows + headroom) // MIB) + 1
