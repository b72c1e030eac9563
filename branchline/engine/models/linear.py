"""Matrix products with a model's weights.

On a CPU the weights are laid out once in the blocks that oneDNN's kernels read, as PyTorch's own compiler does when it
freezes a model. Few rows at a time, which is what decoding and verifying are, then take half the time in bfloat16 and
less in float32; a prompt's many rows take the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812

_PACKED_DTYPES = (torch.float32, torch.bfloat16)


class Linear(Protocol):
    """`x @ weight.T + bias` for a weight `[out, in]`: `[tokens, in]` -> `[tokens, out]`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class DenseLinear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class PackedLinear:
    """`weight` is opaque: only oneDNN knows its layout."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """The fastest form for the weight's device and dtype. Packing copies the weight."""
    if weight.device.type != "cpu" or weight.dtype not in _PACKED_DTYPES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return DenseLinear(weight, bias)
    with torch.no_grad():
        return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias)
