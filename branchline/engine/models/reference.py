"""The reference target: a Llama-family model in plain PyTorch. The oracle of the tests, and what runs without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from branchline.engine.models.checkpoint import TensorSource, Weights, read_config, read_eos_token_ids
from branchline.engine.models.linear import Linear, linear
from branchline.engine.models.protocol import Attention, KvGeometry, TargetOutput, TargetSpec
from branchline.engine.models.reference_config import DecoderConfig, parse_target
from branchline.engine.models.reference_layers import (
    LayerLoader,
    RmsNorm,
    RotaryTable,
    Rotation,
    SelfAttention,
    SwiGlu,
)


@dataclass(frozen=True)
class DecoderLayer:
    """Pre-norm attention and MLP, each added to the residual stream `[tokens, hidden_size]`."""

    input_norm: RmsNorm
    attention: SelfAttention
    post_attention_norm: RmsNorm
    mlp: SwiGlu

    def __call__(self, layer: int, hidden: torch.Tensor, rotation: Rotation, attention: Attention) -> torch.Tensor:
        hidden = hidden + self.attention(layer, self.input_norm(hidden), rotation, attention)
        return hidden + self.mlp(self.post_attention_norm(hidden))


@dataclass(eq=False)
class ReferenceTarget:
    """A TargetModel. `auxiliary_layers`: the layers whose entering values EAGLE-3 fuses, ascending; empty without a
    draft head (the number of layers itself names the value leaving the last one).
    """

    spec: TargetSpec
    embedding: torch.Tensor
    layers: Sequence[DecoderLayer]
    norm: RmsNorm
    head: Linear
    rotary: RotaryTable
    auxiliary_layers: tuple[int, ...] = ()

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> TargetOutput:
        """See TargetModel.forward."""
        rotation = self.rotary(positions)
        hidden = F.embedding(token_ids, self.embedding)
        auxiliary = []
        for index, layer in enumerate(self.layers):
            if index in self.auxiliary_layers:
                auxiliary.append(hidden)
            hidden = layer(index, hidden, rotation, attention)
        if len(self.layers) in self.auxiliary_layers:
            auxiliary.append(hidden)
        return TargetOutput(self.norm(hidden), torch.cat(auxiliary, -1) if auxiliary else None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden_size]` -> `[tokens, vocab_size]`."""
        return self.head(hidden)


def load_target(
    directory: Path, device: torch.device, dtype: torch.dtype, auxiliary_layers: tuple[int, ...] = ()
) -> ReferenceTarget:
    """Loads a Hugging Face checkpoint. Raises ModelError for an unknown architecture or wrong weights."""
    config = parse_target(read_config(directory))
    weights = Weights(directory)
    target = build_target(config, weights, read_eos_token_ids(directory), device, dtype, auxiliary_layers)
    if config.tied_embeddings:
        weights.ignore("lm_head.weight")
    weights.ignore(*(name for name in weights.names() if name.endswith("rotary_emb.inv_freq")))
    weights.check_all_taken()
    return target


def build_target(
    config: DecoderConfig,
    weights: TensorSource,
    eos_token_ids: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    auxiliary_layers: tuple[int, ...] = (),
) -> ReferenceTarget:
    """Builds the model from a source of tensors in Hugging Face's names."""
    loader = LayerLoader(weights, config, device, dtype)
    embedding = loader.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    tied = config.tied_embeddings
    return ReferenceTarget(
        spec=_spec(config, dtype, eos_token_ids),
        embedding=embedding,
        layers=[_load_layer(loader, index) for index in range(config.num_layers)],
        norm=loader.norm("model.norm"),
        head=linear(embedding) if tied else loader.linear(config.hidden_size, {"lm_head": config.vocab_size}),
        rotary=RotaryTable(config.rope, config.head_dim, config.max_position, device, dtype),
        auxiliary_layers=auxiliary_layers,
    )


def read_target_spec(directory: Path, dtype: torch.dtype) -> TargetSpec:
    """What `load_target` will load, from the configuration alone. Raises ModelError."""
    return _spec(parse_target(read_config(directory)), dtype, read_eos_token_ids(directory))


def _spec(config: DecoderConfig, dtype: torch.dtype, eos_token_ids: tuple[int, ...]) -> TargetSpec:
    return TargetSpec(
        kv=KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim, dtype),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position=config.max_position,
        eos_token_ids=eos_token_ids,
    )


def _load_layer(loader: LayerLoader, index: int) -> DecoderLayer:
    prefix, window = f"model.layers.{index}", loader.config.window(index)
    return DecoderLayer(
        input_norm=loader.norm(f"{prefix}.input_layernorm"),
        attention=loader.attention(f"{prefix}.self_attn", loader.config.hidden_size, window),
        post_attention_norm=loader.norm(f"{prefix}.post_attention_layernorm"),
        mlp=loader.mlp(f"{prefix}.mlp"),
    )
