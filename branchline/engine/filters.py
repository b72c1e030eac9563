"""min-p, top-k and top-p without sorting: each is a border on the distance to the likeliest token.

A border is found by radix search over the bit patterns of the distances: non-negative floats are ordered like the
integers with the same bits, so three histograms, of 11, 10 and 10 bits, find it exactly. What is summed are integers:
a sum of floats would depend on its order, and that on the shape of the batch.
"""

from __future__ import annotations

import enum

import torch

#: (shift, bits) of the radix search: together the 31 bits of a non-negative float32.
_DIGITS = ((20, 11), (10, 10), (0, 10))
#: A token's weight in top-p is its probability relative to the likeliest one's, in units of 2**-40.
_WEIGHT_ONE = 2.0**40
_NO_BORDER = 2**31 - 1


class Filter(enum.Flag):
    """Which filters a batch uses at all."""

    NONE = 0
    MIN_P = enum.auto()
    TOP_K = enum.auto()
    TOP_P = enum.auto()


def outside_filters(
    logits: torch.Tensor, min_p_reach: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, used: Filter
) -> torch.Tensor:
    """Which tokens are cut: float32 `[batch, vocab]`, 1 for those and 0 for the rest; never all of a row.

    logits float32 `[batch, vocab]`, divided by the temperature; min_p_reach float32 `[batch]`: -log(min_p), inf is off;
    top_k int64 `[batch]`, 1 to vocab, which is off; top_p float64 `[batch]`, 1 is off. What `used` leaves out must be
    off in all rows. min-p and top-k cut first, then top-p cuts by the probabilities of what they left. A token that
    ties with the last one kept is kept. Distances to the largest logit are compared in float32.
    """
    distance = (logits.amax(-1, keepdim=True) - logits).abs_()  # of two zeros it may be -0.0
    key = distance.view(torch.int32)
    border = min_p_reach[:, None].view(torch.int32)
    if Filter.TOP_K in used:
        one_each = torch.ones_like(key, dtype=torch.int64)
        border = torch.minimum(border, _border(key, one_each, top_k[:, None]))
    if Filter.TOP_P in used:
        border = torch.minimum(border, _mass_border(distance, border, top_p[:, None]))
    return _beyond(key, border)


def _mass_border(distance: torch.Tensor, border: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The border behind the likeliest tokens that hold `top_p` of the probability that lies within `border`."""
    key = distance.view(torch.int32)
    # Nothing beyond 80 weighs a unit; exp is slow where it underflows.
    weights = distance.clamp(max=80.0).neg_().exp_().mul_(_WEIGHT_ONE)
    kept_weights = weights.addcmul_(weights, _beyond(key, border), value=-1.0).long()
    total = kept_weights.sum(-1, keepdim=True)
    wanted = torch.minimum((total * top_p).ceil().long().clamp_(min=1), total)
    # Top-p 1 must not lose the tokens that weigh less than a unit.
    return torch.where(top_p < 1.0, _border(key, kept_weights, wanted), _NO_BORDER)


def _beyond(key: torch.Tensor, border: torch.Tensor) -> torch.Tensor:
    """1.0 where key > border, else 0.0."""
    return (key - border).clamp_(0, 1).float()


def _border(key: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The smallest b such that the weights of all keys <= b add up to `wanted` at least: int32 `[batch, 1]`.

    key int32 `[batch, vocab]`, not negative; weights int64 `[batch, vocab]`; wanted int64 `[batch, 1]`, from 1 to the
    sum of the row's weights.
    """
    low = torch.zeros_like(key[:, :1])
    bins = torch.empty_like(key, dtype=torch.int64)
    for shift, bits in _DIGITS:
        # Bin 0 is everything below `low`, the last one everything beyond the digit's range.
        size = 1 << bits
        bins.copy_((key >> shift).sub_((low >> shift) - 1).clamp_(0, size + 1))
        totals = weights.new_zeros((key.shape[0], size + 2)).scatter_add_(1, bins, weights)
        short = (totals.cumsum(1) < wanted).sum(1, keepdim=True, dtype=torch.int32)
        low = low + ((short - 1) << shift)
    return low
