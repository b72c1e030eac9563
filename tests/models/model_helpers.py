"""Tiny checkpoints on disk, and a plain attention for one sequence, shared by the tests of the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS, MAX_POSITION = 32, 48, 4, 2, 8, 80, 8, 128


class DenseAttention:
    """The Attention protocol for one sequence: causal, K and V kept in dense tensors by layer."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        if layer in self.keys:
            key, value = torch.cat([self.keys[layer], key]), torch.cat([self.values[layer], value])
        self.keys[layer], self.values[layer] = key.clone(), value.clone()  # a compiled model reuses their memory
        group = query.shape[1] // key.shape[1]
        mask = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
        if window is not None:
            mask = mask.triu(len(key) - len(query) - window + 1)
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1),
            key.repeat_interleave(group, 1).transpose(0, 1),
            value.repeat_interleave(group, 1).transpose(0, 1),
            attn_mask=mask,
        )
        return attended.transpose(0, 1)

    def truncate(self, length: int) -> None:
        """Forgets the rows from `length` on."""
        for rows in (self.keys, self.values):
            rows.update({layer: kept[:length] for layer, kept in rows.items()})


def tiny_config(**changes: Any) -> LlamaConfig:
    settings = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_POSITION,
        "initializer_range": 0.3,
        "eos_token_id": 2,
    }
    return LlamaConfig(**settings | changes)


def save_tiny_model(
    directory: Path, config: PretrainedConfig | None = None, cls: type[PreTrainedModel] = LlamaForCausalLM
) -> PreTrainedModel:
    """A randomly initialised model, saved; norms and biases are random too, so that none can be forgotten."""
    torch.manual_seed(1)
    model = cls(config or tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(directory)
    return model


def head_tensors(draft_vocab: int = 40) -> dict[str, torch.Tensor]:
    """A random EAGLE-3 head in SafeAILab's names, float32, for the tiny model; draft entry i is token 2 i."""
    generator = torch.Generator().manual_seed(2)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(size: int = HIDDEN) -> torch.Tensor:
        return torch.rand(size, generator=generator) + 0.5

    return {
        "fc.weight": matrix(HIDDEN, 3 * HIDDEN),
        "midlayer.hidden_norm.weight": norm(),
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.post_attention_layernorm.weight": norm(),
        "midlayer.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
        "midlayer.mlp.gate_proj.weight": matrix(INNER, HIDDEN),
        "midlayer.mlp.up_proj.weight": matrix(INNER, HIDDEN),
        "midlayer.mlp.down_proj.weight": matrix(HIDDEN, INNER),
        "norm.weight": norm(),
        "lm_head.weight": matrix(draft_vocab, HIDDEN),
        "d2t": torch.arange(draft_vocab),
        "t2d": torch.arange(VOCAB) % 2 == 0,
    }


def head_config(**changes: Any) -> dict[str, Any]:
    """The config of `head_tensors` in SafeAILab's format."""
    config = tiny_config(num_hidden_layers=1).to_dict()
    return config | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 40} | changes


def speculators_config(**changes: Any) -> dict[str, Any]:
    """The same in speculators' format."""
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 40,
        "norm_before_residual": False,
        "transformer_layer_config": tiny_config(num_hidden_layers=1).to_dict(),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "tiny", "architectures": ["LlamaForCausalLM"]},
        },
    }
    return config | changes


def in_speculators_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def save_head(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, replaced: dict[str, torch.Tensor] | None = None, drop: tuple[str, ...] = ()) -> None:
    """Rewrites the single safetensors file of a checkpoint."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | (replaced or {})
    save_file({name: tensor for name, tensor in tensors.items() if name not in drop}, path, metadata={"format": "pt"})
