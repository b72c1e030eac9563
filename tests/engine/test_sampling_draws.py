"""Millions of draws against the exact distribution. All draws are fixed by the seed, so nothing here can flake."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sampling_helpers import (
    chi_square_p,
    distribution_by_hand,
    draw,
    edited_by_hand,
    joint_p,
    request_of,
    tensors_of,
)

from branchline.core import Request, SamplingParams
from branchline.engine import sampling
from branchline.engine.filters import outside_filters
from branchline.engine.noise import gumbel_noise

LOGITS = [2.0, 1.0, 0.0, -1.0, 1.5, -2.5]
DRAWS = 2_000_000
#: Below it we say that draws don't follow a distribution.
LIKELY = 1e-3

CASES = {
    "plain": request_of(SamplingParams(1.0, seed=1)),
    "cold": request_of(SamplingParams(0.5, seed=2)),
    "top-k": request_of(SamplingParams(1.0, top_k=4, seed=4)),
    "top-p": request_of(SamplingParams(1.5, top_p=0.8, seed=5)),
    "min-p": request_of(SamplingParams(1.0, min_p=0.15, seed=6)),
    "edits": request_of(
        SamplingParams(
            1.0,
            repetition_penalty=1.3,
            presence_penalty=0.4,
            frequency_penalty=0.2,
            logit_bias=((3, 2.0), (4, -1.0)),
            bad_words=((1, 5),),
            seed=7,
        ),
        emitted=(0, 2, 2, 1),
    ),
    "all": request_of(
        SamplingParams(1.3, top_p=0.9, top_k=4, min_p=0.05, seed=8, frequency_penalty=0.5, sample_index=2),
        emitted=(0, 0),
        stop_token_ids=(4,),
        min_tokens=5,
    ),
}


def prepared(request: Request) -> torch.Tensor:
    """LOGITS as the engine edits and filters them for this request: what is left to do is to divide and draw."""
    rows = tensors_of([request], len(LOGITS))
    assert rows.edits is not None
    edited = rows.edits.apply(torch.tensor([LOGITS, LOGITS]))
    used = sampling.SamplingVariant.of([request]).filters
    outside = outside_filters(edited / rows.temperature[:, None], rows.min_p_reach, rows.top_k, rows.top_p, used)
    return torch.where(outside > 0, float("-inf"), edited)[0]


def unfiltered(request: Request) -> Request:
    params = request.sampling
    plain = SamplingParams(params.temperature, seed=params.seed, sample_index=params.sample_index)
    return request_of(plain)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    """Edits and filters don't depend on the position, so millions of draws may share them; that the whole way gives
    the same tokens is checked on the first few hundred."""
    request = CASES[name]
    edited = edited_by_hand(LOGITS, request, request.emitted)
    tokens = draw(prepared(request), unfiltered(request), DRAWS)
    counts = torch.bincount(tokens, minlength=len(LOGITS))
    assert chi_square_p(counts, distribution_by_hand(edited, request.sampling)) > LIKELY
    assert torch.equal(draw(torch.tensor(LOGITS), request, 400), tokens[:400])


def too_strong(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return gumbel_noise(keys, positions, token_ids) * 1.02


def too_coarse(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """As if from a uniform number of 4 bits."""
    uniform = torch.exp(-torch.exp(-gumbel_noise(keys, positions, token_ids)))
    return -torch.log(-torch.log((torch.floor(uniform * 16) + 0.5) / 16))


def normal(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The right mean and variance, the wrong shape."""
    uniform = torch.exp(-torch.exp(-gumbel_noise(keys, positions, token_ids).double()))
    return (0.57722 + torch.special.ndtri(uniform) * torch.pi / 6**0.5).float()


def shared_by_positions(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Two neighbouring positions draw the same."""
    return gumbel_noise(keys, positions // 2, token_ids)


@pytest.mark.parametrize("wrong", [too_strong, too_coarse, normal])
def test_wrong_noise_would_be_found(
    wrong: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "gumbel_noise", wrong)
    request = CASES["plain"]
    counts = torch.bincount(draw(torch.tensor(LOGITS), request, DRAWS // 4), minlength=len(LOGITS))
    assert chi_square_p(counts, distribution_by_hand(np.array(LOGITS), request.sampling)) < LIKELY / 1000


def pairs(step: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws that differ in one step of position, seed or sample index, half a million pairs of them."""
    logits, count = torch.tensor(LOGITS), DRAWS // 4
    params = SamplingParams(1.0, seed=21)
    if step == "position":
        tokens = draw(logits, request_of(params), 2 * count)
        return tokens[::2], tokens[1::2]
    changed = SamplingParams(1.0, seed=22) if step == "seed" else SamplingParams(1.0, seed=21, sample_index=1)
    return draw(logits, request_of(params), count), draw(logits, request_of(changed), count)


@pytest.mark.parametrize("step", ["position", "seed", "sample"])
def test_neighbouring_draws_are_independent(step: str) -> None:
    first, second = pairs(step)
    assert joint_p(first, second, torch.softmax(torch.tensor(LOGITS).double(), 0)) > LIKELY


def test_dependent_draws_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "gumbel_noise", shared_by_positions)
    first, second = pairs("position")
    assert joint_p(first, second, torch.softmax(torch.tensor(LOGITS).double(), 0)) < LIKELY / 1000


def test_successive_seeds_draw_from_the_distribution() -> None:
    """One draw each at the same position, as when every request is the first of its kind."""
    logits = torch.tensor(LOGITS)
    requests = [request_of(SamplingParams(1.0, seed=seed)) for seed in range(1_000)]
    rows = sampling.SamplingTensors.empty(len(requests), len(LOGITS), logits.device)
    for row, request in enumerate(requests):
        rows.load(row, request, None)
    tokens = sampling.choose_token(
        logits.expand(len(requests), -1), torch.full((len(requests),), 9), rows, sampling.SamplingVariant(noise=True)
    )
    assert chi_square_p(torch.bincount(tokens, minlength=len(LOGITS)), torch.softmax(logits.double(), 0)) > LIKELY
