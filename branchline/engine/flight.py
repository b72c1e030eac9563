"""An iteration in flight: its tokens on their way to the host while the next one may already run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from branchline.core import FinishReason, TokenLogprobs
from branchline.engine.iteration import EXHAUSTED, RUNNING, STOPPED, Emission

_FINISH = {RUNNING: None, STOPPED: FinishReason.STOP, EXHAUSTED: FinishReason.LENGTH}


@dataclass(frozen=True)
class Row:
    """What one iteration did for one slot of the batch. `path`: the numbers of the accepted nodes, ascending."""

    token_ids: tuple[int, ...]
    finish: FinishReason | None
    path: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


class HostCopy:
    """Copies tensors to pinned host memory, asynchronously and in their stream's order; `wait` waits for that copy.

    Tensors that are on the host are handed through.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            tensors = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            )
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._tensors = tensors

    def wait(self) -> tuple[torch.Tensor, ...]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class Landing:
    """An emission on its way to the host."""

    def __init__(self, emission: Emission) -> None:
        self._copy = HostCopy(emission.tensors)

    def rows(self, wanted: list[int | None]) -> list[Row]:
        """The first rows of the batch. `wanted[i]`: how many of the likeliest tokens' log-probabilities row i reports;
        None for none at all."""
        token_ids, counts, finishes, paths, *logprobs = (tensor.tolist() for tensor in self._copy.wait())
        rows = []
        for index, top in enumerate(wanted):
            count = counts[index]
            reports: list[TokenLogprobs] = []
            if top is not None:
                own, top_ids, top_values = (column[index] for column in logprobs)
                for step in range(count):
                    likeliest = zip(top_ids[step][:top], top_values[step][:top], strict=True)
                    reports.append(TokenLogprobs(own[step], tuple(likeliest)))
            path = tuple(after for before, after in pairwise(paths[index]) if after != before)
            rows.append(Row(tuple(token_ids[index][:count]), _FINISH[finishes[index]], path, tuple(reports)))
        return rows
