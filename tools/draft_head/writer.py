"""Many short requests through the engine at once, for throughput: prompts are prefilled together, and the rows of the
beginning that they all share, the chat template's, are computed once and copied.

Prompts go straight into the decode batch's cache: nothing is handed off between workers here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from branchline.config import EngineConfig
from branchline.core import DraftTree, FinishReason, Request
from branchline.engine.attention import PagedAttention
from branchline.engine.cache import BlockTables, slots_of
from branchline.engine.decode import Allocation, DecodeRunner
from branchline.engine.models.protocol import Models
from branchline.engine.sampling import SamplingTensors, SamplingVariant, choose_token
from branchline.engine.tree import StaticTree

#: Tokens of a pass over prompts, padding included, unless a single one is longer.
_PASS_TOKENS = 1024


@dataclass(frozen=True)
class Written:
    """`finish` is None for a request that was cut."""

    request_id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None


@dataclass
class _Sequence:
    request: Request
    allocation: Allocation
    token_ids: list[int] = field(default_factory=list)


class Writer:
    """Not thread-safe. `cut` is asked now and then whether a request's tokens so far are enough."""

    def __init__(self, models: Models, engine: EngineConfig, cut: Callable[[Sequence[int]], bool]) -> None:
        self._models, self._engine, self._cut = models, engine, cut
        self._decode = DecodeRunner(models, engine, StaticTree("none", ()))
        self._waiting: deque[Request] = deque()
        self._running: dict[Allocation, _Sequence] = {}
        self._shared: tuple[tuple[int, ...], Allocation | None] = ((), None)
        self._ranks = itertools.count()
        #: Tokens that it has written, those of requests that still run included.
        self.tokens = 0

    @property
    def max_model_len(self) -> int:
        return self._decode.max_model_len

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._models.target.spec.eos_token_ids

    def share(self, prompt: Sequence[int]) -> None:
        """Computes the beginning that many prompts will share, in whole blocks, and keeps it in a batch slot of its
        own. To be called once, before any other."""
        size = self._engine.block_size
        whole = tuple(prompt[: len(prompt) // size * size])
        if not whole:
            return
        (allocation,) = self._decode.allocate(len(whole), len(whole) + 1, rank=-1.0)
        self._hidden([whole], [allocation], 0)
        self._shared = (whole, allocation)

    def submit(self, request: Request) -> None:
        """Raises InvalidRequestError for a request that can never fit."""
        self._decode.check(len(request.context), request.max_length)
        self._waiting.append(request)

    def step(self) -> list[Written]:
        """Starts what fits, then one iteration; returns the requests that ended."""
        ended = self._start()
        step = self._decode.step()
        for result in step.results:
            sequence = self._running[result.allocation]
            sequence.token_ids += result.token_ids
            self.tokens += len(result.token_ids)
            if result.finish is not None or self._cut(sequence.token_ids):
                ended.append(self._end(sequence, result.finish))
        for allocation in step.preempted:
            sequence = self._running.pop(allocation)
            self._waiting.appendleft(dataclasses.replace(sequence.request, emitted=tuple(sequence.token_ids)))
        return ended

    def _end(self, sequence: _Sequence, finish: FinishReason | None) -> Written:
        del self._running[sequence.allocation]
        self._decode.release(sequence.allocation)
        return Written(sequence.request.request_id, tuple(sequence.token_ids), finish)

    def _start(self) -> list[Written]:
        """Prefills what there is room for, prompts of like length together."""
        fresh: list[_Sequence] = []
        while self._waiting and self._decode.can_allocate(len(self._waiting[0].context)):
            request = self._waiting.popleft()
            rank = float(next(self._ranks))
            (allocation,) = self._decode.allocate(len(request.context), request.max_length, rank=rank)
            fresh.append(_Sequence(request, allocation, list(request.emitted)))
        fresh.sort(key=lambda sequence: len(sequence.request.context))
        ended = []
        while fresh:
            count = 1
            while count < len(fresh) and _fit_together(fresh[: count + 1]):
                count += 1
            group, fresh = fresh[:count], fresh[count:]
            for sequence, token_id in zip(group, self._first_tokens(group), strict=True):
                self._running[sequence.allocation] = sequence
                sequence.token_ids.append(token_id)
                self.tokens += 1
                finish = sequence.request.finish_after(token_id)
                if finish is None:
                    self._decode.start(sequence.allocation, sequence.request, token_id, DraftTree(), False)
                else:
                    ended.append(self._end(sequence, finish))
        return ended

    @torch.inference_mode()
    def _first_tokens(self, group: list[_Sequence]) -> list[int]:
        contexts = [sequence.request.context for sequence in group]
        allocations = [sequence.allocation for sequence in group]
        prefix, source = self._shared
        if source is not None and all(len(c) > len(prefix) and c[: len(prefix)] == prefix for c in contexts):
            self._copy(source, allocations, len(prefix))
            begin = len(prefix)
        else:
            begin = 0
        logits = self._models.target.logits(self._hidden(contexts, allocations, begin))
        requests = [sequence.request for sequence in group]
        rows = SamplingTensors.empty(len(group), self._models.target.spec.vocab_size, self._models.device)
        for row, request in enumerate(requests):
            rows.load(row, request, None)
        positions = torch.tensor([len(context) for context in contexts], device=self._models.device)
        first: list[int] = choose_token(logits, positions, rows, SamplingVariant.of(requests)).tolist()
        return first

    @torch.inference_mode()
    def _hidden(self, contexts: list[tuple[int, ...]], allocations: list[Allocation], begin: int) -> torch.Tensor:
        """The last states `[batch, hidden]` of contexts whose first `begin` rows are in the cache; puts the others
        there. Short ones are padded; what stands behind a sequence's end is not written, and nothing sees it."""
        device, longest = self._models.device, max(map(len, contexts)) - begin
        tokens = torch.tensor(
            [[*context[begin:], *[0] * (longest + begin - len(context))] for context in contexts], device=device
        )
        counts = torch.tensor([len(context) - begin for context in contexts], device=device)
        offsets = torch.arange(longest, device=device)[None]
        zeros = torch.zeros_like(counts)
        attention = PagedAttention.over(
            self._decode.caches.target,
            BlockTables(self._tables(allocations, begin + longest)),
            zeros + begin,
            zeros,
            torch.ones((1, longest, longest), dtype=torch.bool, device=device).tril(),
            offsets.expand(len(contexts), -1),
            offsets < counts[:, None],
        )
        positions = (offsets + begin).expand(len(contexts), -1).reshape(-1)
        output = self._models.target.forward(tokens.reshape(-1), positions, attention)
        last = torch.arange(len(contexts), device=device) * longest + counts - 1
        return output.hidden.index_select(0, last)

    def _copy(self, source: Allocation, targets: list[Allocation], tokens: int) -> None:
        """The first rows of one sequence to others."""
        size = self._engine.block_size
        positions = torch.arange(tokens, device=self._models.device)[None]
        rows = slots_of(self._tables([source], tokens), positions, size).expand(len(targets), -1)
        places = slots_of(self._tables(targets, tokens), positions.expand(len(targets), -1), size)
        self._decode.caches.target.move(rows, places)

    def _tables(self, allocations: list[Allocation], tokens: int) -> torch.Tensor:
        """The block tables as far as `tokens` reach, int64 `[batch, width]`; the null block where there is none."""
        width = -(-tokens // self._engine.block_size)
        padded = [[*allocation.blocks, *[0] * width][:width] for allocation in allocations]
        return torch.tensor(padded, dtype=torch.int64, device=self._models.device)


def _fit_together(group: list[_Sequence]) -> bool:
    """Whether one pass over them, the last being the longest, is not too long, nor half of it padding."""
    lengths = [len(sequence.request.context) for sequence in group]
    padded = len(lengths) * lengths[-1]
    return padded <= _PASS_TOKENS and padded <= 2 * sum(lengths)
