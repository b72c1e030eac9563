"""Draws in the millions, and what they should look like: a reference in NumPy and float64, sorting where the engine
searches and looping where it scatters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from branchline.core import Request, SamplingParams
from branchline.engine.sampling import SamplingTensors, SamplingVariant, choose_token

CPU = torch.device("cpu")
_CHUNK = 1 << 16


def request_of(sampling: SamplingParams | None = None, **changes: object) -> Request:
    defaults = {"request_id": "one", "prompt": (0,), "max_tokens": 100}
    return Request(**{**defaults, "sampling": sampling or SamplingParams(), **changes})


def tensors_of(requests: Sequence[Request], vocab_size: int) -> SamplingTensors:
    """One row per request, and a padding row."""
    tensors = SamplingTensors.empty(len(requests) + 1, vocab_size, CPU)
    for row, request in enumerate(requests):
        tensors.load(row, request, None)
    return tensors


def choose(logits: torch.Tensor, requests: Sequence[Request], positions: Sequence[int]) -> torch.Tensor:
    """One batch: logits `[batch, vocab]`, as many requests and positions."""
    variant = SamplingVariant.of(requests)
    rows = tensors_of(requests, logits.shape[-1]).select(torch.arange(len(requests)), variant)
    return choose_token(logits, torch.tensor(positions), rows, variant)


def draw(logits: torch.Tensor, request: Request, count: int, first: int = 0, stride: int = 1) -> torch.Tensor:
    """Tokens at `count` positions, all from the same logits `[vocab]`: int64 `[count]`."""
    variant = SamplingVariant.of([request])
    tensors = tensors_of([request], len(logits))
    tokens = []
    for start in range(0, count, _CHUNK):
        positions = first + stride * torch.arange(start, min(start + _CHUNK, count))
        rows = tensors.select(torch.zeros_like(positions), variant)
        tokens.append(choose_token(logits.expand(len(positions), -1), positions, rows, variant))
    return torch.cat(tokens)


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How likely counts at least this far from the probabilities are; 0 where something impossible was counted."""
    possible = probabilities > 0
    if counts[~possible].any():
        return 0.0
    expected = (probabilities * counts.sum())[possible].double()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(len(expected) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def joint_p(first: torch.Tensor, second: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The chi-square test of a joint table against independent draws from `probabilities`."""
    size = len(probabilities)
    counts = torch.bincount(first * size + second, minlength=size * size)
    return chi_square_p(counts, torch.outer(probabilities, probabilities).flatten())


def edited_by_hand(logits: Sequence[float], request: Request, output: Sequence[int]) -> np.ndarray:
    """What `logit_edits` documents, token by token, in float64; `output` holds all tokens emitted so far."""
    sampling = request.sampling
    biased = [float(logit) for logit in logits]
    for token_id, bias in sampling.logit_bias:
        biased[token_id] += bias
    banned = set()
    for *beginning, last in sampling.bad_words:
        if not beginning or list(output[-len(beginning) :]) == beginning:
            banned.add(last)
    if len(output) < request.min_tokens:
        banned.update(request.stop_token_ids)
    if all(token_id in banned or logit == -np.inf for token_id, logit in enumerate(biased)):
        banned = set()
    edited = []
    for token_id, logit in enumerate(biased):
        if token_id in banned:
            logit = -np.inf
        if token_id in request.prompt or token_id in output:
            penalty = sampling.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        if token_id in output:
            logit -= sampling.presence_penalty
        edited.append(logit - sampling.frequency_penalty * list(output).count(token_id))
    return np.array(edited)


def kept_by_sorting(logits: np.ndarray, sampling: SamplingParams, blur: float = 0.0) -> np.ndarray:
    """Which tokens min-p, top-k and top-p keep, bool `[vocab]`; logits float64, divided by the temperature.

    `blur` moves the borders of min-p and top-p: what two blurs of opposite sign agree on does not hang on rounding.
    """
    relative = np.exp(logits - logits.max())
    kept = relative >= sampling.min_p * (1 - blur)
    ranked = np.sort(relative[kept])[::-1]
    if 0 < sampling.top_k < len(ranked):
        kept &= relative >= ranked[sampling.top_k - 1]
    if sampling.top_p < 1.0:
        ranked = np.sort(relative[kept])[::-1]
        reached = np.cumsum(ranked) / ranked.sum() >= sampling.top_p * (1 + blur)
        kept &= relative >= (ranked[int(reached.argmax())] if reached.any() else 0.0)
    return kept


def distribution_by_hand(edited: np.ndarray, sampling: SamplingParams) -> torch.Tensor:
    """The exact probabilities of a draw from edited logits: float64 `[vocab]`."""
    scaled = edited / sampling.temperature
    weights = np.where(kept_by_sorting(scaled, sampling), np.exp(scaled - scaled.max()), 0.0)
    return torch.from_numpy(weights / weights.sum())
