"""Choosing tokens from logits, the same way wherever a token is chosen.

A token is the argmax over the processed log-probabilities plus Gumbel noise, which draws from exactly their
distribution (Gumbel 1954; Maddison et al. 2014). The noise is a counter-based hash of (seed, position, token id), so it
depends on nothing else: not on the batch, the tree, or which worker computes it. See docs/architecture.md, section 5.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from branchline.core import SamplingParams

#: Part of the target's fingerprint: workers that choose tokens differently must not share a request. Raise it when the
#: same logits, seed and position would give another token.
SAMPLER_VERSION = "1"

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer: 2**64 / phi, splitmix64's increment
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB


class SamplingVariant(enum.Enum):
    """What a batch needs; a host-side constant, so that greedy batches don't pay for noise or filters."""

    GREEDY = "greedy"
    NOISE = "noise"
    FILTERED = "filtered"  # noise, and top-k or top-p somewhere in the batch


@dataclass
class SamplingTensors:
    """Per-request settings on the device, `[batch]` each."""

    seed: torch.Tensor  # int64
    temperature: torch.Tensor  # float32; 0 is greedy
    top_p: torch.Tensor  # float32
    top_k: torch.Tensor  # int64; 0 keeps all

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> SamplingTensors:
        return cls(
            seed=torch.zeros(batch, dtype=torch.int64, device=device),
            temperature=torch.zeros(batch, dtype=torch.float32, device=device),
            top_p=torch.ones(batch, dtype=torch.float32, device=device),
            top_k=torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def load(self, row: int, params: SamplingParams) -> None:
        """Fills a row from the host."""
        self.seed[row] = params.seed
        self.temperature[row] = params.temperature
        self.top_p[row] = params.top_p
        self.top_k[row] = params.top_k

    def select(self, index: torch.Tensor) -> SamplingTensors:
        return SamplingTensors(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; PyTorch's is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64, wrapping."""
    value = (value ^ _shift_right(value, 30)) * _MIX_A
    value = (value ^ _shift_right(value, 27)) * _MIX_B
    return value ^ _shift_right(value, 31)


def gumbel_noise(seed: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise: seed int64 `[batch]`, positions int64 `[batch, n]`, token_ids `[vocab]` -> float32
    `[batch, n, vocab]`. `positions` are the absolute positions of the tokens to be chosen.
    """
    key = _mix(_mix(seed)[:, None] + positions * _GOLDEN)
    bits = _mix(key[:, :, None] + (token_ids + 1) * _GOLDEN)
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    # -log(1 - u) keeps its digits for small u, where the largest noise comes from.
    return torch.log(-torch.log1p(-uniform)).neg().float()


def _threshold(probabilities: torch.Tensor, reaches: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The largest t such that the tokens with probability >= t reach a goal; exact, by bisecting the bit patterns,
    which are ordered like the non-negative floats they stand for. probabilities `[..., vocab]` -> `[..., 1]`.
    """
    low = torch.zeros_like(probabilities[..., :1]).view(torch.int32)
    high = probabilities.amax(-1, keepdim=True).view(torch.int32)
    for _ in range(31):
        middle = low + torch.div(high - low + 1, 2, rounding_mode="floor")
        enough = reaches(probabilities >= middle.view(torch.float32))
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle - 1)
    return low.view(torch.float32)


def _filtered(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Masks everything outside top-k, then outside top-p of what is left. Ties at the border are all kept.

    logits float32 `[batch, n, vocab]`, top_k and top_p `[batch]`.
    """
    probabilities = torch.softmax(logits, -1)
    vocab = logits.shape[-1]
    wanted = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)[:, None, None]
    border = _threshold(probabilities, lambda kept: kept.sum(-1, keepdim=True) >= wanted)
    probabilities = torch.where(probabilities >= border, probabilities, 0.0)
    mass = probabilities.sum(-1, keepdim=True) * top_p[:, None, None]
    border = _threshold(probabilities, lambda kept: (probabilities * kept).sum(-1, keepdim=True) >= mass)
    # top_p 1 must not lose the tail to rounding in the sum.
    keep = (probabilities >= border) | (top_p >= 1.0)[:, None, None]
    return torch.where(keep & (probabilities > 0), logits, float("-inf"))


def choose_tokens(
    logits: torch.Tensor,
    depths: torch.Tensor,
    first_position: torch.Tensor,
    levels: int,
    sampling: SamplingTensors,
    variant: SamplingVariant,
) -> torch.Tensor:
    """The target's own token at every node: logits `[batch, nodes, vocab]` -> int64 `[batch, nodes]`.

    A node of depth d (`depths` int64 `[batch, nodes]`, below `levels`) chooses the token at position
    `first_position` + d; nodes of equal depth share their noise.
    """
    greedy = logits.argmax(-1)
    if variant is SamplingVariant.GREEDY:
        return greedy
    vocab = logits.shape[-1]
    scaled = logits.float() / sampling.temperature.clamp(min=1e-6)[:, None, None]
    if variant is SamplingVariant.FILTERED:
        scaled = _filtered(scaled, sampling.top_k, sampling.top_p)
    positions = first_position[:, None] + torch.arange(levels, device=logits.device)
    noise = gumbel_noise(sampling.seed, positions, torch.arange(vocab, device=logits.device))
    noise = noise.gather(1, depths[:, :, None].expand(-1, -1, vocab))
    return torch.where(sampling.temperature[:, None] > 0, (scaled + noise).argmax(-1), greedy)


def draft_scores(
    log_probabilities: torch.Tensor,
    logits: torch.Tensor,
    positions: torch.Tensor,
    target_token_ids: torch.Tensor,
    sampling: SamplingTensors,
    variant: SamplingVariant,
) -> torch.Tensor:
    """What the draft head ranks children by: logits float32 `[batch, n, draft_vocab]`, positions int64 `[batch, n]`.

    The same noise that will choose the target's token raises the chance that it is among the guesses.
    """
    if variant is SamplingVariant.GREEDY:
        return log_probabilities
    temperature = sampling.temperature[:, None, None]
    noise = gumbel_noise(sampling.seed, positions, target_token_ids)
    return torch.where(temperature > 0, logits / temperature.clamp(min=1e-6) + noise, log_probabilities)
