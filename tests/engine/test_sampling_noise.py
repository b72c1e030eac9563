"""The noise is standard Gumbel, and what lies next to each other in any direction is unrelated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_helpers import chi_square_p

from branchline.engine.noise import gumbel_noise, noise_key


def noise_of(seeds: range, samples: range, positions: range, tokens: range) -> torch.Tensor:
    """float64 `[seeds, samples, positions, tokens]`."""
    keys = torch.tensor([[noise_key(seed, sample) for sample in samples] for seed in seeds])
    at = torch.arange(positions.start, positions.stop).expand(keys.numel(), -1)
    noise = gumbel_noise(keys.flatten(), at, torch.arange(tokens.start, tokens.stop))
    return noise.double().view(*keys.shape, len(positions), len(tokens))


def test_moments() -> None:
    noise = noise_of(range(1), range(1), range(100), range(10_000))
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.005)  # Euler's constant; a deviation is 0.0013
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.015)


def test_quantiles_down_to_rare_ones() -> None:
    noise = noise_of(range(2), range(1), range(20), range(50_000)).flatten()
    steps = torch.tensor([2.0**-power for power in range(17, 1, -1)], dtype=torch.float64)
    cumulative = torch.cat([steps, 1 - steps.flip(0)])
    borders = -torch.log(-torch.log(cumulative))
    counts = torch.bincount(torch.bucketize(noise, borders), minlength=len(borders) + 1)
    edges = torch.cat([torch.zeros(1).double(), cumulative, torch.ones(1).double()])
    assert chi_square_p(counts, edges.diff()) > 1e-4


def test_the_extremes_lie_where_they_should() -> None:
    """The largest of a million lies around log(1e6) = 13.8, the smallest around -log(log(1e6)) = -2.6."""
    noise = noise_of(range(1), range(1), range(20), range(50_000))
    assert noise.isfinite().all()
    assert 11 < noise.max().item() < 24
    assert -3.3 < noise.min().item() < -2.2


@pytest.mark.parametrize("axis", ["seed", "sample", "position", "token"])
def test_neighbours_are_uncorrelated(axis: str) -> None:
    noise = noise_of(range(4), range(4), range(50, 82), range(2000)) - 0.57722
    dimension = ["seed", "sample", "position", "token"].index(axis)
    size = noise.shape[dimension]
    for lag in (1, 2):
        ahead, behind = noise.narrow(dimension, lag, size - lag), noise.narrow(dimension, 0, size - lag)
        correlation = (ahead * behind).mean() / (math.pi**2 / 6)
        assert abs(correlation) < 5 / math.sqrt(ahead.numel())


def test_no_two_places_share_their_noise() -> None:
    """Were two streams the same but for a shift, some values would meet again: float32 has collisions by chance, a
    handful among 40,000 draws, a shifted copy would add thousands."""
    noise = noise_of(range(3), range(3), range(9), range(500)).flatten()
    assert len(noise) - len(noise.unique()) < 400


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_noise_depends_on_key_position_and_token_alone(data: st.DataObject) -> None:
    small = st.integers(0, 2**20)
    seeds = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
    positions = data.draw(st.lists(small, min_size=1, max_size=3))
    tokens = data.draw(st.lists(small, min_size=1, max_size=70))
    keys = torch.tensor([noise_key(seed, 3) for seed in seeds])
    together = gumbel_noise(keys, torch.tensor(positions).expand(len(seeds), -1), torch.tensor(tokens))
    row, place, token = (data.draw(st.integers(0, len(values) - 1)) for values in (seeds, positions, tokens))
    alone = gumbel_noise(keys[row : row + 1], torch.tensor([[positions[place]]]), torch.tensor([tokens[token]]))
    assert alone.item() == together[row, place, token].item()


def test_keys_differ_by_seed_and_sample() -> None:
    keys = {noise_key(seed, sample) for seed in [*range(50), 2**63 - 1] for sample in range(16)}
    assert len(keys) == 51 * 16
