"""A draft head's directory in SafeAILab's format: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from branchline.engine.models.checkpoint import Weights
from branchline.engine.models.eagle3 import check_fits
from branchline.engine.models.eagle3_config import read_eagle3_config
from branchline.engine.models.protocol import ModelError, TargetSpec
from branchline.engine.models.reference_config import DecoderConfig
from tools.draft_head.head import DraftHead


@dataclass(frozen=True)
class HeadTensors:
    """`parameters` have the names of `head.DraftHead`; target_token_ids int64 `[draft_vocab]`, ascending."""

    parameters: dict[str, torch.Tensor]
    target_token_ids: torch.Tensor


def write_head(
    directory: Path, config: DecoderConfig, head: HeadTensors, eos_token_ids: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Writes both files. `config` has the sizes of the head's layer and the target's vocabulary."""
    ids = head.target_token_ids
    known = torch.zeros(config.vocab_size, dtype=torch.bool)
    known[ids] = True
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in head.parameters.items()}
    tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": known}
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_json_config(config, len(ids), eos_token_ids, dtype), indent=1)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_head(directory: Path, target: TargetSpec) -> HeadTensors:
    """A head to go on from. Raises ModelError for a variant that is not trained here, or one for another target."""
    config = read_eagle3_config(directory)
    check_fits(config, target)
    if config.norm_before_residual or config.norm_before_fc or config.fc_norm or config.norm_output:
        raise ModelError(f"{directory}: heads with further norms can't be trained on here")
    weights = Weights(directory)
    layer = "midlayer." if "midlayer.hidden_norm.weight" in weights else "layers.0."
    with torch.device("meta"):
        wanted = DraftHead(config.decoder, config.draft_vocab_size, 1).state_dict()
    parameters = {name: weights.take(name.replace("midlayer.", layer), tensor.shape) for name, tensor in wanted.items()}
    ids = torch.arange(config.draft_vocab_size)
    if "d2t" in weights:
        ids = ids + weights.take("d2t", (config.draft_vocab_size,)).to(torch.int64)
    # Heads carry the target's embedding now and then; training takes it from the target itself.
    weights.ignore("t2d", "embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
    weights.check_all_taken()
    return HeadTensors(parameters, ids)


def _json_config(
    config: DecoderConfig, draft_vocab: int, eos_token_ids: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "draft_vocab_size": draft_vocab,
    }
    rope = config.rope
    if rope.kind != "default":
        scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind == "llama3":
            scaling |= {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_position,
            }
        fields["rope_scaling"] = scaling
    if eos_token_ids:
        fields["eos_token_id"] = eos_token_ids[0] if len(eos_token_ids) == 1 else list(eos_token_ids)
    return fields
