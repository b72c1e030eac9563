"""What a draft head takes from its target's checkpoint: sizes, embedding, output rows and final norm."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from branchline.engine.models.checkpoint import Weights, read_config, read_eos_token_ids
from branchline.engine.models.reference_config import DecoderConfig, parse_decoder


@dataclass(frozen=True)
class TargetParts:
    """Tensors on the CPU, in the checkpoint's dtype."""

    config: DecoderConfig
    eos_token_ids: tuple[int, ...]
    #: `[vocab_size, hidden_size]`, what the head embeds tokens with.
    embedding: torch.Tensor
    #: `[vocab_size, hidden_size]`, of which the target's logits are the products with its hidden states.
    output: torch.Tensor
    #: `[hidden_size]`
    norm: torch.Tensor

    @property
    def head_config(self) -> DecoderConfig:
        """The head's one layer is a layer of the target's sizes, without biases and windows."""
        return dataclasses.replace(
            self.config, num_layers=1, qkv_bias=False, output_bias=False, mlp_bias=False, windows=()
        )


def read_target(directory: Path) -> TargetParts:
    """Raises ModelError for a checkpoint whose tensors have other names or shapes than a Llama's."""
    raw = read_config(directory)
    config = parse_decoder(raw, (raw.get("architectures") or ["LlamaForCausalLM"])[0])
    weights, shape = Weights(directory), (config.vocab_size, config.hidden_size)
    embedding = weights.take("model.embed_tokens.weight", shape)
    output = embedding if config.tied_embeddings else weights.take("lm_head.weight", shape)
    norm = weights.take("model.norm.weight", (config.hidden_size,))
    return TargetParts(config, read_eos_token_ids(directory), embedding, output, norm)
