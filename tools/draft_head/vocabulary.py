"""The draft vocabulary: the tokens that the head can name, those most frequent in what the model wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tools.draft_head.batches import Features
from tools.draft_head.checkpoint import HeadTensors
from tools.draft_head.store import Work
from tools.draft_head.target import TargetParts


@dataclass(frozen=True)
class Vocabulary:
    """target_token_ids int64 `[draft_vocab]`, ascending; `coverage` is their part of the written tokens."""

    target_token_ids: torch.Tensor
    coverage: float


def count_tokens(texts: Iterable[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """int64 `[vocab_size]`: how often each token is in the texts, int `[tokens]` each."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for text in texts:
        counts += torch.bincount(text, minlength=vocab_size)
    return counts


def choose(counts: torch.Tensor, size: int, always: tuple[int, ...]) -> Vocabulary:
    """The `size` most frequent tokens, the tokens in `always` whatever their frequency; of equally frequent ones those
    with the smaller ids."""
    size = min(size, len(counts))
    ranked = counts.clone()
    ranked[list(always)] = counts.max() + 1
    ids = torch.sort(ranked, descending=True, stable=True).indices[:size].sort().values
    return of_ids(counts, ids)


def of_ids(counts: torch.Tensor, ids: torch.Tensor) -> Vocabulary:
    """A vocabulary that is settled already."""
    return Vocabulary(ids, counts[ids].sum().item() / max(int(counts.sum()), 1))


def read(path: Path) -> Vocabulary:
    with safe_open(path, framework="pt") as file:
        return Vocabulary(file.get_tensor("target_token_ids"), float(file.metadata()["coverage"]))


def settle(work: Work, size: int, target: TargetParts, features: Features, before: HeadTensors | None) -> Vocabulary:
    """The work's vocabulary, settled with the first checkpoint. Going on from a head with as many tokens keeps its
    own."""
    if work.vocabulary.exists() and work.checkpoint.exists():
        return read(work.vocabulary)
    size = min(size, target.config.vocab_size)
    texts = (features.written(sample) for sample in features.samples)
    counts = count_tokens(texts, target.config.vocab_size)
    if before is not None and len(before.target_token_ids) == size:
        vocabulary = of_ids(counts, before.target_token_ids)
    else:
        vocabulary = choose(counts, size, target.eos_token_ids)
    with work.writing(work.vocabulary) as temporary:
        metadata = {"coverage": repr(vocabulary.coverage)}
        save_file({"target_token_ids": vocabulary.target_token_ids}, temporary, metadata)
    return vocabulary
