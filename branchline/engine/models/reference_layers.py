"""The layers that the reference target and the EAGLE-3 head share, in few and merged operations.

Everything is a function of tensors on one device without host reads, so it runs under FakeTensorMode and
inside a CUDA graph. Tensors are `[tokens, …]`: sequences are told apart by the attention context only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from branchline.engine.models.checkpoint import TensorSource
from branchline.engine.models.linear import Linear, linear
from branchline.engine.models.protocol import Attention
from branchline.engine.models.reference_config import DecoderConfig, RopeConfig


@dataclass(frozen=True)
class RmsNorm:
    """Root-mean-square norm; 16-bit inputs are reduced in float32. weight `[features]`."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Rotation:
    """cos and signed sin of one pass's positions, each `[tokens, 1, head_dim]`."""

    cos: torch.Tensor
    signed_sin: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates `[tokens, heads, head_dim]`, first half against second half, as Hugging Face lays out Llama's heads.

        Rolling by half a head swaps the halves; the minus of (-x2, x1) is in the table's sin.
        """
        return x * self.cos + x.roll(x.shape[-1] // 2, -1) * self.signed_sin


class RotaryTable:
    """cos and signed sin of every position: computed in float32, then cast; read by position on the device."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_position: int, device: torch.device, dtype: torch.dtype):
        positions = torch.arange(max_position, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(rope, head_dim)
        cos, sin = angles.cos(), angles.sin()
        #: `[max_position, 2, 1, head_dim]`
        self._table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)[:, :, None]
        self._table = self._table.to(device, dtype)

    def __call__(self, positions: torch.Tensor) -> Rotation:
        cos, signed_sin = self._table[positions].unbind(1)
        return Rotation(cos, signed_sin)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 `[head_dim / 2]`, radians per position."""
    default = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return default / rope.factor
    if rope.kind == "llama3":
        return _stretch_low_frequencies(default, rope)
    return default


def _stretch_low_frequencies(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - kept) * frequencies / rope.factor + kept * frequencies
    is_long = wavelengths > rope.original_max_position / rope.low_freq_factor
    is_short = wavelengths < rope.original_max_position / rope.high_freq_factor
    return torch.where(is_long, frequencies / rope.factor, torch.where(is_short, frequencies, between))


@dataclass(frozen=True)
class SelfAttention:
    """Merged query, key and value projection, rotation, the context's attention, output projection."""

    qkv: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    #: See Attention.attend.
    window: int | None = None

    def __call__(self, layer: int, x: torch.Tensor, rotation: Rotation, attention: Attention) -> torch.Tensor:
        """x `[tokens, in]` -> `[tokens, hidden_size]`."""
        rotated_heads = self.num_heads + self.num_kv_heads
        qkv = self.qkv(x).view(x.shape[0], rotated_heads + self.num_kv_heads, self.head_dim)
        query_key, value = rotation(qkv[:, :rotated_heads]), qkv[:, rotated_heads:]
        query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        attended = attention.attend(layer, query, key, value, window=self.window)
        return self.output(attended.flatten(1))


@dataclass(frozen=True)
class SwiGlu:
    """down(silu(gate(x)) * up(x)), gate and up merged."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


@dataclass(frozen=True)
class LayerLoader:
    """Builds layers from a source's tensors, on a device and in a dtype."""

    weights: TensorSource
    config: DecoderConfig
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self.weights.take(name, shape).to(self.device, self.dtype)

    def norm(self, name: str, size: int | None = None) -> RmsNorm:
        weight = self.tensor(f"{name}.weight", self.config.hidden_size if size is None else size)
        return RmsNorm(weight, self.config.rms_norm_eps)

    def linear(self, inputs: int, outputs: dict[str, int], bias: bool = False) -> Linear:
        """One projection, or several of the same input merged: `outputs` maps names to output features."""
        weights = [self.tensor(f"{name}.weight", size, inputs) for name, size in outputs.items()]
        biases = [self.tensor(f"{name}.bias", size) for name, size in outputs.items()] if bias else []
        return linear(_merge(weights), _merge(biases) if bias else None)

    def attention(self, prefix: str, inputs: int, window: int | None = None) -> SelfAttention:
        config, names = self.config, (f"{prefix}.{part}_proj" for part in "qkv")
        qkv = self.linear(inputs, dict(zip(names, config.qkv_sizes, strict=True)), config.qkv_bias)
        output = self.linear(config.qkv_sizes[0], {f"{prefix}.o_proj": config.hidden_size}, config.output_bias)
        return SelfAttention(qkv, output, config.num_heads, config.num_kv_heads, config.head_dim, window)

    def mlp(self, prefix: str) -> SwiGlu:
        hidden, inner, bias = self.config.hidden_size, self.config.intermediate_size, self.config.mlp_bias
        gate_up = self.linear(hidden, {f"{prefix}.gate_proj": inner, f"{prefix}.up_proj": inner}, bias)
        return SwiGlu(gate_up, self.linear(inner, {f"{prefix}.down_proj": hidden}, bias))


def _merge(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
