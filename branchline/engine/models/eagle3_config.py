"""An EAGLE-3 head's `config.json` in both public formats: SafeAILab's (flat) and speculators' (nested)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchline.engine.models.checkpoint import read_config
from branchline.engine.models.protocol import ModelError
from branchline.engine.models.reference_config import DecoderConfig, parse_decoder

#: EAGLE-3 fuses a low, a middle and a high layer.
NUM_AUXILIARY = 3


@dataclass(frozen=True)
class Eagle3Config:
    """`decoder` describes the head's one layer; the switches are variants that published heads were trained with."""

    decoder: DecoderConfig
    draft_vocab_size: int
    #: The hidden size of the target that the head was trained for.
    target_hidden_size: int
    #: Layers whose entering values are fused; None takes the usual three.
    auxiliary_layers: tuple[int, ...] | None
    #: The residual is the normed hidden state instead of the raw one.
    norm_before_residual: bool
    #: One norm over the concatenated auxiliary states before `fc`.
    norm_before_fc: bool
    #: A norm for each auxiliary state before `fc`.
    fc_norm: bool
    #: The recurrent state is the one after the final norm.
    norm_output: bool

    def layers_to_fuse(self, num_layers: int) -> tuple[int, ...]:
        """Target layers whose entering values make the auxiliary states, ascending. Raises ModelError."""
        layers = self.auxiliary_layers or (2, num_layers // 2, num_layers - 3)
        if len(set(layers)) != NUM_AUXILIARY or not all(0 <= layer <= num_layers for layer in layers):
            raise ModelError(f"the draft head fuses layers {list(layers)}, not three of the target's {num_layers}")
        return tuple(sorted(layers))


def read_eagle3_config(directory: Path) -> Eagle3Config:
    """Raises ModelError for a missing or unsupported config, naming what is not supported."""
    config = read_config(directory)
    nested = "speculators_model_type" in config
    if nested and config["speculators_model_type"] != "eagle3":
        raise ModelError(f"draft heads of type {config['speculators_model_type']} are not supported, only eagle3")
    layer = config.get("transformer_layer_config") if nested else config
    if not isinstance(layer, Mapping):
        raise ModelError(f"{directory}: config.json has no transformer_layer_config")
    if layer.get("model_type", "llama") != "llama":
        raise ModelError(f"draft heads with {layer['model_type']} layers are not supported, only llama")
    decoder = parse_decoder(layer)
    if decoder.num_layers != 1:
        raise ModelError(f"the draft head has {decoder.num_layers} layers; heads of one layer are supported")
    eagle = config.get("eagle_config") or {}
    return Eagle3Config(
        decoder=decoder,
        draft_vocab_size=config.get("draft_vocab_size") or decoder.vocab_size,
        target_hidden_size=config.get("target_hidden_size") or decoder.hidden_size,
        auxiliary_layers=_auxiliary_layers(config, eagle),
        norm_before_residual=bool(config.get("norm_before_residual", nested)),
        norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
        fc_norm=bool(config.get("fc_norm", False)),
        norm_output=bool(config.get("norm_output", False)),
    )


def _auxiliary_layers(config: Mapping[str, Any], eagle: Mapping[str, Any]) -> tuple[int, ...] | None:
    name = "eagle_aux_hidden_state_layer_ids"
    layers = config.get(name) or eagle.get(name)
    return tuple(layers) if layers else None
