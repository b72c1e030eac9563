"""Gumbel noise by a counter-based hash: the same wherever and in whatever company it is computed.

A token's noise depends on (seed, sample index, position, token id) and on nothing else, so it needs no generator whose
state would have to travel with a request. All integer arithmetic wraps at 64 bits.
"""

from __future__ import annotations

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer: 2**64 / phi, splitmix64's increment
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB

#: The largest float32 below 1. A draw that would round to 1 is taken as this, which moves a probability by less than
#: 2**-24 and keeps the noise finite.
_BELOW_ONE = 1.0 - 2.0**-24


def noise_key(seed: int, sample_index: int) -> int:
    """What tells one sample of one request from all others; a signed 64-bit integer for `gumbel_noise`."""
    mixed_seed = _mix_(torch.tensor(seed, dtype=torch.int64))
    return int(_mix_(mixed_seed + (sample_index + 1) * torch.tensor(_GOLDEN)).item())


def gumbel_noise(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, finite: keys int64 `[batch]` (`noise_key`), positions int64 `[batch, n]`, token_ids int64
    `[vocab]` -> float32 `[batch, n, vocab]`. `positions` are the absolute positions of the tokens to be chosen.
    """
    streams = _mix_(keys[:, None] + positions * _GOLDEN)
    bits = _mix_(streams[:, :, None] + (token_ids + 1).mul_(_GOLDEN))
    # 53 bits make a uniform number; float32 keeps the leading 24 that are not zero. -log(1 - u) is fine where u is
    # small, and that is where the large noise comes from, which decides: it is exact up to -log(2**-54), about 37.
    uniform = _shift_right(bits, 11, bits).float().add_(0.5).mul_(2.0**-53).clamp_(max=_BELOW_ONE)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _mix_(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64, wrapping. In place, with one scratch tensor: new
    memory for every step would cost more than the arithmetic."""
    shifted = torch.empty_like(value)
    value.bitwise_xor_(_shift_right(value, 30, shifted)).mul_(_MIX_A)
    value.bitwise_xor_(_shift_right(value, 27, shifted)).mul_(_MIX_B)
    return value.bitwise_xor_(_shift_right(value, 31, shifted))


def _shift_right(value: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Logical shift into `out`, which may be `value`; PyTorch's is arithmetic."""
    return torch.bitwise_right_shift(value, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)
