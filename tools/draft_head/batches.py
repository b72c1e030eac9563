"""From feature files to the batches that training reads: whole conversations, in an order that the seed settles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from branchline.engine.models.protocol import ModelError
from tools.draft_head.causal import Spans
from tools.draft_head.head import Rows


@dataclass(frozen=True)
class Sample:
    """Where a conversation is: its file, its first row there, its tokens, and the offset of the first that the model
    wrote."""

    file: int
    start: int
    length: int
    begun: int

    @property
    def learned(self) -> int:
        """Rows whose token the model wrote, and which have another one to predict."""
        return self.length - self.begun - 1


@dataclass(frozen=True)
class Batch:
    """`rows` for the head; hidden `[learned, hidden_size]`, the target's states that its probabilities for the token
    after each learned row's are computed from; choices int64 `[learned]`, its first choice (a target's token id); left
    int64 `[learned]`, how many tokens of the conversation follow the row's own."""

    rows: Rows
    hidden: torch.Tensor
    choices: torch.Tensor
    left: torch.Tensor


class Features:
    """All feature files, mapped into memory and read by conversation."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._open = ExitStack()
        self._files: list[Any] = [self._open.enter_context(safe_open(path, framework="pt")) for path in paths]
        self.samples = [entry for index, file in enumerate(self._files) for entry in _samples(index, file)]
        if not self.samples:
            raise ModelError("no two written tokens in a row: there is nothing to train on")

    def close(self) -> None:
        self._open.close()

    def written(self, sample: Sample) -> torch.Tensor:
        """What the model wrote of it, int32 `[tokens]`."""
        return self._read(sample, "tokens", sample.begun, sample.length)

    def batch(self, samples: Sequence[Sample], steps: int) -> Batch:
        """Reads conversations; on the CPU. Row i of one pairs token i + 1 with the states at i: the rows up to the
        first token that the model wrote are context, and each written token but the last is learned from."""
        tokens, auxiliary, positions = _Parts(), _Parts(), _Parts()
        hidden, choices, left = [], [], []
        for entry in samples:
            border, end = entry.begun - 1, entry.length - 2
            ids = self._read(entry, "tokens", 0, entry.length)
            states = self._read(entry, "auxiliary", 0, end)
            tokens.add(ids[1 : border + 1], ids[border + 1 : end + 1])
            auxiliary.add(states[:border], states[border:])
            positions.add(torch.arange(border), torch.arange(border, end))
            hidden.append(self._read(entry, "hidden", entry.begun, entry.length - 1))
            choices.append(self._read(entry, "choices", entry.begun, entry.length - 1))
            left.append(torch.arange(entry.learned, 0, -1))
        spans = Spans(tuple(entry.begun - 1 for entry in samples), tuple(entry.learned for entry in samples))
        padded = torch.cat([*tokens.context, *tokens.learned, torch.zeros(steps, dtype=torch.int32)]).long()
        rows = Rows(padded, auxiliary.joined(), positions.joined(), spans)
        return Batch(rows, torch.cat(hidden), torch.cat(choices).long(), torch.cat(left))

    def _read(self, sample: Sample, name: str, start: int, stop: int) -> torch.Tensor:
        rows: torch.Tensor = self._files[sample.file].get_slice(name)[sample.start + start : sample.start + stop]
        return rows


class _Parts:
    """Pieces of the context and of the learned rows, collected apart."""

    def __init__(self) -> None:
        self.context: list[torch.Tensor] = []
        self.learned: list[torch.Tensor] = []

    def add(self, context: torch.Tensor, learned: torch.Tensor) -> None:
        self.context.append(context)
        self.learned.append(learned)

    def joined(self) -> torch.Tensor:
        return torch.cat([*self.context, *self.learned])


def split(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """What is trained on, and what is held out to measure on: a fiftieth, at most 64, none of very few."""
    held_out = min(64, math.ceil(len(samples) / 50)) if len(samples) >= 8 else 0
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[i] for i in sorted(order[held_out:])], [samples[i] for i in sorted(order[:held_out])]


def schedule(lengths: Sequence[int], batch_tokens: int, epochs: float, seed: int) -> list[list[int]]:
    """The batches of all epochs, as indices: each epoch in another order, cut where `batch_tokens` are full; of a last
    part of an epoch the first batches."""
    batches: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(lengths), generator=generator).tolist()
        cut = cut_batches(order, lengths, batch_tokens)
        batches += cut[: max(1, round(len(cut) * min(1.0, epochs - epoch)))]
    return batches


def cut_batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Neighbours, as many as fit; a longer one goes alone."""
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if not batches or lengths[index] > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def _samples(index: int, file: Any) -> list[Sample]:
    starts, begun = file.get_tensor("starts").tolist(), file.get_tensor("begun").tolist()
    borders = zip(starts[:-1], starts[1:], begun, strict=True)
    entries = [Sample(index, start, end - start, first) for start, end, first in borders]
    return [entry for entry in entries if entry.learned >= 1]
