"""The filters' borders against sorting, ties and all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampling_helpers import kept_by_sorting, request_of

from branchline.core import SamplingParams
from branchline.engine.filters import outside_filters
from branchline.engine.sampling import SamplingVariant


def kept(logits: torch.Tensor, *params: SamplingParams) -> torch.Tensor:
    """bool `[batch, vocab]`; logits float32 `[batch, vocab]`, divided by the temperature."""
    outside = outside_filters(
        logits,
        torch.tensor([abs(math.log(p.min_p)) if p.min_p else math.inf for p in params]),
        torch.tensor([p.top_k or logits.shape[1] for p in params]).clamp(max=logits.shape[1]),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        SamplingVariant.of(request_of(p) for p in params).filters,
    )
    assert ((outside == 0) | (outside == 1)).all()
    return outside == 0


def sampling(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> SamplingParams:
    return SamplingParams(1.0, top_p=top_p, top_k=top_k, min_p=min_p)


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, SamplingParams]:
    """Logits with or without many ties and -inf, and filters of which any may be off."""
    size = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    logits = torch.randn(size, generator=generator) * draw(st.sampled_from([0.01, 1.0, 5.0, 50.0]))
    if draw(st.booleans()):
        logits = (logits * 2).round() / 2
    banned = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    banned[0] = False
    top_k = draw(st.just(0) | st.integers(1, 45))
    top_p = draw(st.just(1.0) | st.floats(0.001, 1.0))
    min_p = draw(st.just(0.0) | st.floats(0.0, 1.0))
    return logits.masked_fill(banned, -math.inf), sampling(top_k, top_p, min_p)


@settings(deadline=None, max_examples=150)
@given(rows())
def test_filters_keep_what_sorting_keeps(row: tuple[torch.Tensor, SamplingParams]) -> None:
    logits, params = row
    wide, narrow = (kept_by_sorting(logits.double().numpy(), params, blur) for blur in (1e-5, -1e-5))
    assume((wide == narrow).all())  # else rounding decides
    mine = kept(logits[None], params)[0].numpy()
    possible = np.isfinite(logits.numpy())
    assert (mine == wide)[possible].all()


@settings(deadline=None, max_examples=30)
@given(st.lists(rows(), min_size=2, max_size=5), st.integers(1, 300))
def test_a_row_keeps_the_same_in_any_batch(batch: list[tuple[torch.Tensor, SamplingParams]], repeats: int) -> None:
    """Also at widths where a sum of floats would be summed in another order."""
    width = max(len(logits) for logits, _ in batch)
    padded = [torch.nn.functional.pad(logits, (0, width - len(logits)), value=-1.0) for logits, _ in batch]
    together = torch.stack(padded).repeat(1, repeats)
    everyone = kept(together, *[params for _, params in batch])
    for index, (_, params) in enumerate(batch):
        assert torch.equal(everyone[index], kept(together[index : index + 1], params)[0])


@pytest.mark.parametrize("top_k", [1, 2, 50, 767, 4999, 5000])
def test_top_k_of_many(top_k: int) -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(5)) * 3
    distance = logits.amax(1, keepdim=True) - logits
    border = distance.sort(1).values[:, top_k - 1 : top_k]
    assert torch.equal(kept(logits, *[sampling(top_k)] * 3), distance <= border)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_of_many(top_p: float) -> None:
    """The smallest set that reaches top_p, in float64: without its least likely token it falls short."""
    logits = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(6)) * 2
    probabilities = torch.softmax(logits.double(), 1)
    mine = kept(logits, *[sampling(top_p=top_p)] * 2)
    mass = (probabilities * mine).sum(1)
    least = torch.where(mine, probabilities, 1.0).amin(1)
    assert (probabilities[~mine].amax() <= least.amax()).item()
    assert (mass >= top_p - 1e-6).all()
    assert (mass - least <= top_p + 1e-6).all()


def test_ties_at_the_border_are_kept() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    assert kept(logits, sampling(top_k=1)).tolist() == [[True, True, True, False, False]]
    assert kept(logits, sampling(top_k=4)).all()
    assert kept(logits / 5, sampling(top_p=0.01)).tolist() == [[True, True, True, False, False]]
    assert kept(logits, sampling(min_p=1.0)).tolist() == [[True, True, True, False, False]]
    assert kept(torch.tensor([[-0.0, 0.0, -1.0]]), sampling(top_k=1)).tolist() == [[True, True, False]]
    assert kept(torch.tensor([[0.0, -0.0, -1.0]]), sampling(min_p=1.0)).tolist() == [[True, True, False]]


def test_neighbouring_floats_are_told_apart() -> None:
    best = torch.tensor([3.0])
    logits = torch.stack([best, best.nextafter(torch.tensor([0.0])), best - 1], 1)
    assert kept(logits, sampling(top_k=1)).tolist() == [[True, False, False]]
    assert kept(logits, sampling(min_p=1.0)).tolist() == [[True, False, False]]


def test_what_is_off_keeps_even_the_least_likely() -> None:
    logits = torch.tensor([[0.0, -50.0, -1000.0, -1e8]])
    assert kept(logits, sampling()).all()
    assert kept(logits, sampling(top_k=3)).tolist() == [[True, True, True, False]]
    assert kept(logits, sampling(top_p=0.999999)).tolist() == [[True, False, False, False]]


def test_min_p_and_top_k_come_before_top_p() -> None:
    """Of 0.4, 0.3, 0.2, 0.1 the first two have 4/7 and 3/7: 0.5 needs only the first, which alone falls short of 0.5
    among all four."""
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    first = [[True, False, False, False]]
    assert kept(logits, sampling(top_k=2, top_p=0.5)).tolist() == first
    assert kept(logits, sampling(min_p=0.6, top_p=0.5)).tolist() == first
    assert kept(logits, sampling(top_p=0.5)).tolist() == [[True, True, False, False]]


def test_broken_logits_raise_nothing() -> None:
    """A device that trips over an index takes the whole process with it: NaN must stay the row's own problem."""
    logits = torch.tensor([[math.nan, 1.0, 0.0], [-math.inf] * 3, [math.inf, 0.0, 1.0], [2.0, 1.0, 0.0]])
    params = sampling(top_k=2, top_p=0.9)
    assert kept(logits, *[params] * 4)[3].tolist() == kept(logits[3:], params)[0].tolist()
