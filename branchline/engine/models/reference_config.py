"""What a Llama-family `config.json` says, checked: only what the reference model truly computes gets through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from branchline.engine.models.protocol import ModelError

#: Architectures that are one computation: pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is `default`, `linear` or `llama3`; the fields after theta serve the latter two."""

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a Llama-family decoder (or of the one layer of an EAGLE-3 head)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    #: Each layer's sliding window in tokens, None where it sees everything; empty when all layers do.
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output features of the query, key and value projections."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv


def parse_target(config: Mapping[str, Any]) -> DecoderConfig:
    """A target model's config. Raises ModelError naming what is not supported."""
    names = config.get("architectures") or ["(none named)"]
    if names[0] not in ARCHITECTURES:
        raise ModelError(
            f"the reference provider doesn't know the architecture {names[0]}; it serves {', '.join(ARCHITECTURES)}"
        )
    if config.get("quantization_config"):
        raise ModelError("the reference provider doesn't serve quantised checkpoints")
    return parse_decoder(config, names[0])


def parse_decoder(config: Mapping[str, Any], architecture: str = "LlamaForCausalLM") -> DecoderConfig:
    """The decoder part of a config in Hugging Face's field names. Raises ModelError."""
    qwen2 = architecture == "Qwen2ForCausalLM"
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"activation {config['hidden_act']} is not supported, only silu")
    hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    num_kv_heads = _integer(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{num_heads} attention heads can't share {num_kv_heads} KV heads evenly")
    head_dim = _integer(config, "head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} is odd, so it can't be rotated")
    max_position = _integer(config, "max_position_embeddings")
    return DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_integer(config, "vocab_size"),
        max_position=max_position,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=parse_rope(config, max_position),
        qkv_bias=qwen2 or bool(config.get("attention_bias", False)),
        output_bias=not qwen2 and bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        windows=parse_windows(config, architecture),
    )


def parse_rope(config: Mapping[str, Any], max_position: int) -> RopeConfig:
    """RoPE from either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`. Raises ModelError."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"rope type {kind} is not supported, only default, linear and llama3")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("partial rotary embeddings are not supported")
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    try:
        scaling = {name: float(rope[name]) for name in needed[kind]}
    except KeyError as error:
        raise ModelError(f"rope type {kind} lacks {error.args[0]}") from error
    return RopeConfig(
        kind=kind,
        theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        original_max_position=int(rope.get("original_max_position_embeddings") or max_position),
        **scaling,
    )


def parse_windows(config: Mapping[str, Any], architecture: str) -> tuple[int | None, ...]:
    """The layers' sliding windows. Mistral slides in every layer when a window is named; Qwen2 with
    `use_sliding_window`, in the layers that `layer_types` lists, or else from `max_window_layers` on. Raises ModelError
    where others would slide."""
    layers = range(_integer(config, "num_hidden_layers"))
    kinds = tuple(config.get("layer_types") or ())
    if architecture == "MistralForCausalLM":
        slides = config.get("sliding_window") is not None
        return (_integer(config, "sliding_window"),) * len(layers) if slides else ()
    if architecture == "Qwen2ForCausalLM":
        if not config.get("use_sliding_window", False):
            return ()
        first = int(config.get("max_window_layers", 28))  # transformers' default
        sliding = [kind == "sliding_attention" for kind in kinds] or [layer >= first for layer in layers]
        if len(sliding) != len(layers) or not {*kinds} <= {"full_attention", "sliding_attention"}:
            raise ModelError(f"config.json: layer_types must name {len(layers)} full or sliding layers, got {kinds}")
        window = _integer(config, "sliding_window")
        return tuple(window if slides else None for slides in sliding)
    if config.get("sliding_window") is not None or any(kind != "full_attention" for kind in kinds):
        raise ModelError(f"sliding-window attention is not supported in {architecture}")
    return ()


def _integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value
