"""Prefill and decode in one process, with the hand-off's bytes between them: the engine without workers."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from branchline.config import EngineConfig
from branchline.core import (
    DraftTree,
    FinishReason,
    KvPart,
    KvSpan,
    Request,
    SpeculationStats,
    TokenLogprobs,
)
from branchline.engine.decode import Allocation, DecodeRunner
from branchline.engine.grammar import Grammar
from branchline.engine.models.protocol import Models
from branchline.engine.prefill import PrefillRunner, PrefillTask
from branchline.engine.step import StepResult
from branchline.engine.tree import TreeTopology


@dataclass
class Output:
    """One request's tokens, and how they came about."""

    token_ids: list[int] = field(default_factory=list)
    stats: SpeculationStats = SpeculationStats()  # noqa: RUF009 - immutable
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    preemptions: int = 0


@dataclass(frozen=True)
class HandedOff:
    """One sample after its prefill; it decodes unless its first token ended it."""

    allocation: Allocation
    request: Request
    first_token: int
    tree: DraftTree
    finish: FinishReason | None
    logprobs: TokenLogprobs | None


class Pipeline:
    """Requests go through prefill one at a time, and decode together. `decode` are DecodeRunner's further arguments."""

    def __init__(self, models: Models, tree: TreeTopology, engine: EngineConfig, **decode: Any) -> None:
        self.prefill = PrefillRunner(models, engine, tree)
        self.decode = DecodeRunner(models, engine, tree, **decode)
        #: Bytes of KV handed off so far.
        self.shipped = 0

    def hand_off(
        self, request: Request, ship_draft: bool = True, rank: float = 0.0, grammar: Grammar | None = None
    ) -> HandedOff:
        """Prefills, and starts decoding unless the first token ends the request."""
        (sample,) = self.hand_off_samples(request, 1, ship_draft, rank, grammar)
        return sample

    def hand_off_samples(
        self,
        request: Request,
        samples: int,
        ship_draft: bool = True,
        rank: float = 0.0,
        grammar: Grammar | None = None,
    ) -> list[HandedOff]:
        """As `hand_off`, for samples that share the prompt's blocks; a grammar serves one sample."""
        assert grammar is None or samples == 1
        context = len(request.context)
        keys = self.decode.keys(request.context)
        group = self.decode.allocate(context, request.max_length, samples, rank, keys=keys)
        held = group[0].held
        task = self.prefill.begin(request, samples)
        while not task.done:
            start, end = self.prefill.advance(task)
            if end > held:
                self._ship(task, group[0], KvPart.TARGET, (max(start, held), end))
        allowed = None if grammar is None else grammar.allowed(())
        firsts = [self.prefill.first_token(task, sample, allowed) for sample in range(samples)]
        if grammar is not None:
            grammar.advance((firsts[0].token_id,))
        has_draft_kv = ship_draft and self.prefill.draft_kv is not None
        trees = []
        for sample, allocation in enumerate(group):
            trees.append(self.prefill.draft(task, sample) if has_draft_kv else DraftTree())
            if has_draft_kv:
                self._ship(task, allocation, KvPart.DRAFT, (max(1, held) if sample == 0 else context, context + 1))
        self.prefill.release(task)
        self.decode.share_context(group, has_draft_kv)
        handed_off = []
        for index, (allocation, first, tree) in enumerate(zip(group, firsts, trees, strict=True)):
            sampling = dataclasses.replace(request.sampling, sample_index=request.sampling.sample_index + index)
            sample_request = dataclasses.replace(request, sampling=sampling)
            if first.finish is None:
                self.decode.start(allocation, sample_request, first.token_id, tree, has_draft_kv, grammar)
            entry = HandedOff(allocation, sample_request, first.token_id, tree, first.finish, first.logprobs)
            handed_off.append(entry)
        return handed_off

    def run(self, requests: list[Request], in_flight: int = 1, ship_draft: bool = True) -> dict[str, Output]:
        """All requests to their ends, `in_flight` at a time; returns each one's output by its id. A request that is
        preempted is prefilled again with what it has emitted."""
        outputs = {request.request_id: Output() for request in requests}
        ranks = {request.request_id: float(rank) for rank, request in enumerate(requests)}
        waiting = deque(requests)
        live: dict[Allocation, Request] = {}
        while waiting or live:
            while waiting and len(live) < in_flight and self._fits(waiting[0]):
                request = waiting.popleft()
                sample = self.hand_off(request, ship_draft, ranks[request.request_id])
                output = outputs[request.request_id]
                output.token_ids.append(sample.first_token)
                output.logprobs += [sample.logprobs] if sample.logprobs else []
                output.finish = sample.finish
                if sample.finish is None:
                    live[sample.allocation] = request
                else:
                    self.decode.release(sample.allocation)
            step = self.decode.step()
            for result in step.results:
                self._take(result, outputs[live[result.allocation].request_id])
                if result.finish is not None:
                    del live[result.allocation]
                    self.decode.release(result.allocation)
            for allocation in step.preempted:
                request = live.pop(allocation)
                output = outputs[request.request_id]
                output.preemptions += 1
                waiting.appendleft(dataclasses.replace(request, emitted=tuple(output.token_ids)))
            self.decode.check_integrity()
        assert self.decode.pool.used == self.prefill.pool.used == self.decode.running == 0
        return outputs

    def _fits(self, request: Request) -> bool:
        return self.decode.can_allocate(len(request.context), keys=self.decode.keys(request.context))

    def _take(self, result: StepResult, output: Output) -> None:
        output.token_ids += result.token_ids
        output.logprobs += result.logprobs
        output.stats += SpeculationStats(1, result.drafted, len(result.token_ids) - 1)
        output.finish = result.finish

    def _ship(self, task: PrefillTask, allocation: Allocation, part: KvPart, tokens: tuple[int, int]) -> None:
        kv = self.prefill.target_kv if part is KvPart.TARGET else self.prefill.draft_kv
        assert kv is not None
        span = KvSpan(part, (0, kv.num_layers), (0, kv.num_kv_heads), tokens)
        data = self.prefill.export(task, span)
        self.shipped += len(data)
        self.decode.import_kv(allocation, span, data)
