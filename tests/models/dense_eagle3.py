"""EAGLE-3 written a second time, straight from the paper and raw tensors: what the head is compared with.

Dense, float64, one sequence, everything recomputed at every call; it shares no code with the engine.
"""

from __future__ import annotations

from typing import Any

import torch


def dense_eagle3(
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    embedding: torch.Tensor,
    token_ids: torch.Tensor,
    fused: torch.Tensor,
    norm_before_residual: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows pair token_ids[r] with fused[r], at RoPE position r. Returns draft logits and recurrent states."""
    weights = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
    eps, heads = config["rms_norm_eps"], config["num_attention_heads"]
    group, dim = heads // config["num_key_value_heads"], config["head_dim"]
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    embedded, fused = embedding.double()[token_ids], fused.double()

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"midlayer.{name}.weight"].T

    def rotate(x: torch.Tensor) -> torch.Tensor:
        """Each pair (i, i + dim / 2) is a complex number, turned by position * theta^(-2i / dim)."""
        angles = torch.arange(len(x)).double()[:, None] / theta ** (torch.arange(0, dim, 2).double() / dim)
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    normed = norm("midlayer.hidden_norm", fused)
    pairs = torch.cat([norm("midlayer.input_layernorm", embedded), normed], -1)
    query, key, value = (project(f"self_attn.{part}_proj", pairs).unflatten(-1, (-1, dim)) for part in "qkv")
    query, key = rotate(query), rotate(key).repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * dim**-0.5
    scores = scores.masked_fill(torch.ones(len(pairs), len(pairs)).triu(1).bool(), -torch.inf)
    attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(group, 1)).flatten(1)

    residual = normed if norm_before_residual else fused
    hidden = residual + project("self_attn.o_proj", attended)
    inner = norm("midlayer.post_attention_layernorm", hidden)
    gate = project("mlp.gate_proj", inner)
    recurrent = hidden + project("mlp.down_proj", gate * gate.sigmoid() * project("mlp.up_proj", inner))
    return norm("norm", recurrent) @ weights["lm_head.weight"].T, recurrent
