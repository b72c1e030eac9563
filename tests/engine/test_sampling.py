from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchline.core import SamplingParams
from branchline.engine.sampling import SamplingTensors, SamplingVariant, choose_tokens, gumbel_noise
from branchline.engine.sequence import variant_for


def sampling_of(*rows: SamplingParams) -> SamplingTensors:
    tensors = SamplingTensors.empty(len(rows), torch.device("cpu"))
    for row, params in enumerate(rows):
        tensors.load(row, params)
    return tensors


def draw(logits: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    """Tokens at `count` successive positions, all with the same logits `[vocab]`."""
    depths = torch.arange(count)[None]
    return choose_tokens(
        logits.expand(1, count, -1), depths, torch.tensor([5]), count, sampling_of(params), variant_for([params])
    )[0]


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    counts = torch.bincount(draw(logits, SamplingParams(temperature, seed=3), 200_000), minlength=5)
    # The 99.99th percentile of chi-square with 4 degrees of freedom; the draws are fixed by the seed.
    assert chi_square(counts, torch.softmax(logits / temperature, -1)) < 23.5


def test_successive_draws_are_uncorrelated() -> None:
    tokens = draw(torch.zeros(4), SamplingParams(1.0, seed=8), 100_000)
    pairs = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16)
    assert chi_square(pairs, torch.full((16,), 1 / 16)) < 44.3  # 99.99th percentile, 15 degrees


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    ids = torch.tensor([3, 7])
    alone = gumbel_noise(torch.tensor([11]), torch.tensor([[40]]), ids)
    among = gumbel_noise(torch.tensor([5, 11]), torch.tensor([[40, 41], [39, 40]]), torch.tensor([7, 1, 3]))
    assert torch.equal(alone[0, 0], among[1, 1, [2, 0]])
    assert len(set(among.flatten().tolist())) == among.numel()


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.tensor([1]), torch.arange(100)[None], torch.arange(5000)).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_filters_keep_what_sorting_would_keep(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(10, generator=generator) * 3
    order = torch.softmax((logits / temperature).double(), -1).sort(descending=True)
    kept = order.values[: top_k or None]
    cumulative = kept.cumsum(0) / kept.sum()
    size = int((cumulative < top_p - 1e-6).sum()) + 1
    allowed = set(order.indices[:size].tolist())
    border = min(float((cumulative - top_p).abs().min()), 1.0)
    drawn = set(draw(logits, SamplingParams(temperature, top_p, top_k, seed), 300).tolist())
    if border > 1e-5:  # otherwise rounding decides about the last one
        assert drawn <= allowed


def test_filters_keep_enough() -> None:
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    assert set(draw(logits, SamplingParams(1.0, top_k=3), 500).tolist()) == {0, 1, 2}
    assert set(draw(logits, SamplingParams(1.0, top_p=0.999), 2000).tolist()) == {0, 1, 2, 3, 4}
    assert set(draw(logits, SamplingParams(5.0, top_p=0.01), 500).tolist()) == {0, 1, 2}  # ties are all kept


def test_a_batch_may_mix_greedy_and_sampled_rows() -> None:
    rows = [SamplingParams(), SamplingParams(1.0, seed=4), SamplingParams(0.8, top_k=2, seed=4)]
    logits = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0))
    depths = torch.tensor([[0, 1, 1, 2, 2, 3]]).expand(3, -1)
    together = choose_tokens(logits, depths, torch.tensor([7, 9, 9]), 4, sampling_of(*rows), SamplingVariant.FILTERED)
    assert torch.equal(together[0], logits[0].argmax(-1))
    for row, params in enumerate(rows[1:], 1):
        alone = choose_tokens(
            logits[row : row + 1], depths[:1], torch.tensor([9]), 4, sampling_of(params), variant_for([params])
        )
        assert torch.equal(together[row], alone[0])


def test_nodes_of_equal_depth_share_their_noise() -> None:
    logits = torch.randn(1, 1, 50).expand(1, 3, 50)
    chosen = choose_tokens(
        logits,
        torch.tensor([[1, 1, 2]]),
        torch.tensor([3]),
        3,
        sampling_of(SamplingParams(1.5, seed=1)),
        SamplingVariant.NOISE,
    )[0]
    later = choose_tokens(
        logits[:, :1],
        torch.tensor([[0]]),
        torch.tensor([4]),
        1,
        sampling_of(SamplingParams(1.5, seed=1)),
        SamplingVariant.NOISE,
    )[0]
    assert chosen[0] == chosen[1] == later[0]
