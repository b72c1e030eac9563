"""Prefill and decode in one process, with the hand-off's bytes between them: for benchmarks and tests of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from branchline.config import EngineConfig
from branchline.core import DraftTree, FinishReason, KvPart, KvSpan, Request, SpeculationStats
from branchline.engine.decode import Allocation, DecodeRunner
from branchline.engine.models.protocol import Models
from branchline.engine.prefill import PrefillRunner
from branchline.engine.tree import TreeTopology


@dataclass
class Output:
    """One request's tokens, and how they came about."""

    token_ids: list[int]
    stats: SpeculationStats = SpeculationStats()  # noqa: RUF009 - immutable


class Pipeline:
    """Requests go through prefill one at a time, and decode together."""

    def __init__(self, models: Models, tree: TreeTopology, engine: EngineConfig) -> None:
        self.prefill = PrefillRunner(models, engine, tree)
        self.decode = DecodeRunner(models, engine, tree)

    def hand_off(
        self, request: Request, ship_draft: bool = True
    ) -> tuple[Allocation, int, DraftTree, FinishReason | None]:
        """Prefills, and starts decoding unless the first token ends the request."""
        allocation = self.decode.allocate(request.max_length)
        task = self.prefill.begin(request)
        kv = self.prefill.target_kv
        while not task.done:
            tokens = self.prefill.advance(task)
            span = KvSpan(KvPart.TARGET, (0, kv.num_layers), (0, kv.num_kv_heads), tokens)
            self.decode.import_kv(allocation, span, self.prefill.export(task, span))
        first, finish = self.prefill.first_token(task)
        draft_kv = self.prefill.draft_kv if ship_draft else None
        tree = self.prefill.draft(task) if draft_kv else DraftTree()
        if draft_kv:
            rows = (1, len(request.context) + 1)
            span = KvSpan(KvPart.DRAFT, (0, draft_kv.num_layers), (0, draft_kv.num_kv_heads), rows)
            self.decode.import_kv(allocation, span, self.prefill.export(task, span))
        self.prefill.release(task)
        if finish is None:
            self.decode.start(allocation, request, first, tree, has_draft_kv=draft_kv is not None)
        return allocation, first, tree, finish

    def run(self, requests: list[Request], in_flight: int = 1, ship_draft: bool = True) -> dict[str, Output]:
        """All requests to their ends, `in_flight` at a time; returns each one's output by its id."""
        outputs: dict[str, Output] = {}
        waiting = list(requests)
        live: dict[int, Output] = {}
        while waiting or live:
            while waiting and len(live) < in_flight:
                request = waiting.pop(0)
                allocation, first, _, finish = self.hand_off(request, ship_draft)
                outputs[request.request_id] = Output([first])
                if finish is None:
                    live[allocation.slot] = outputs[request.request_id]
                else:
                    self.decode.release(allocation)
            for result in self.decode.step():
                output = live[result.allocation.slot]
                output.token_ids += result.token_ids
                output.stats += SpeculationStats(1, result.drafted, len(result.token_ids) - 1)
                if result.finish is not None:
                    del live[result.allocation.slot]
                    self.decode.release(result.allocation)
            self.decode.check_integrity()
        assert self.decode.pool.used == self.prefill.pool.used == self.decode.running == 0
        return outputs
