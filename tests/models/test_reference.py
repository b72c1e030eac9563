"""The reference target against transformers, on tiny random models of every supported shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    MAX_POSITION,
    DenseAttention,
    edit_config,
    save_tiny_model,
    tiny_config,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from branchline.engine.models.protocol import KvGeometry, ModelError
from branchline.engine.models.reference import load_target, read_target_spec

pytestmark = pytest.mark.models

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 80, (40,), generator=torch.Generator().manual_seed(3))

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "grouped": {},
    "one KV head": {"num_key_value_heads": 1},
    "all KV heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "large eps": {"rms_norm_eps": 0.1},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    changes: dict[str, Any] = request.param
    return changes


def full_forward(target: Any, token_ids: torch.Tensor) -> torch.Tensor:
    output = target.forward(token_ids, torch.arange(len(token_ids)), DenseAttention())
    logits: torch.Tensor = target.logits(output.hidden)
    return logits


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_match_transformers(tmp_path: Path, variant: dict[str, Any], dtype: torch.dtype) -> None:
    model = save_tiny_model(tmp_path, tiny_config(**variant)).to(dtype)
    target = load_target(tmp_path, CPU, dtype)
    torch.testing.assert_close(full_forward(target, TOKENS), model(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)


def sister_config(config_class: type, **changes: Any) -> Any:
    settings = {name: getattr(tiny_config(), name) for name in tiny_config().to_diff_dict() if name != "model_type"}
    settings.pop("head_dim")
    return config_class(**settings | {"num_key_value_heads": KV_HEADS} | changes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config_class", "model_class", "changes"),
    [
        (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
        (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}),
    ],
)
def test_sister_architectures_match_transformers(
    tmp_path: Path, config_class: type, model_class: type, changes: dict[str, Any]
) -> None:
    model = save_tiny_model(tmp_path, sister_config(config_class, **changes), model_class)
    target = load_target(tmp_path, CPU, torch.float32)
    torch.testing.assert_close(full_forward(target, TOKENS), model(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_qwen2_slides_from_a_layer_on_when_its_layers_are_not_listed(tmp_path: Path) -> None:
    config = sister_config(Qwen2Config, use_sliding_window=True, sliding_window=6, max_window_layers=3)
    model = save_tiny_model(tmp_path, config, Qwen2ForCausalLM)
    edit_config(tmp_path, layer_types=None)
    target = load_target(tmp_path, CPU, torch.float32)
    assert [layer.attention.window for layer in target.layers] == [None] * 3 + [6] * (LAYERS - 3)
    torch.testing.assert_close(full_forward(target, TOKENS), model(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_tokens_match_transformers_one_by_one(tmp_path: Path, variant: dict[str, Any]) -> None:
    model = save_tiny_model(tmp_path, tiny_config(**variant))
    target = load_target(tmp_path, CPU, torch.float32)
    expected = model.generate(TOKENS[None, :5], max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0)
    attention, sequence, chunk = DenseAttention(), TOKENS[:5].tolist(), TOKENS[:5]
    while len(sequence) < expected.shape[1]:
        positions = torch.arange(len(sequence) - len(chunk), len(sequence))
        logits = target.logits(target.forward(chunk, positions, attention).hidden[-1:])
        logits[:, 2] = -torch.inf  # transformers holds EOS back the same way
        chunk = logits.argmax(-1)
        sequence.append(int(chunk))
    assert sequence == expected[0].tolist()


@torch.no_grad()
def test_a_chunked_forward_equals_the_whole_one(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    target = load_target(tmp_path, CPU, torch.float64)
    attention, positions = DenseAttention(), torch.arange(len(TOKENS))
    pieces = [target.forward(TOKENS[part], positions[part], attention) for part in (slice(0, 7), slice(7, 40))]
    logits = torch.cat([target.logits(piece.hidden) for piece in pieces])
    torch.testing.assert_close(logits, full_forward(target, TOKENS))


@torch.no_grad()
def test_auxiliary_states_are_the_values_entering_the_layers(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    states = model(TOKENS[None], output_hidden_states=True).hidden_states
    target = load_target(tmp_path, CPU, torch.float32, auxiliary_layers=(0, 2, 3))
    output = target.forward(TOKENS, torch.arange(len(TOKENS)), DenseAttention())
    assert output.auxiliary is not None
    torch.testing.assert_close(output.auxiliary, torch.cat([states[i][0] for i in (0, 2, 3)], -1), rtol=1e-4, atol=1e-4)
    assert load_target(tmp_path, CPU, torch.float32).forward(TOKENS, TOKENS, DenseAttention()).auxiliary is None


def test_the_value_leaving_the_last_layer_is_auxiliary_too(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    target = load_target(tmp_path, CPU, torch.float32, auxiliary_layers=(1, 2, LAYERS))
    output = target.forward(TOKENS, torch.arange(len(TOKENS)), DenseAttention())
    assert output.auxiliary is not None
    torch.testing.assert_close(target.norm(output.auxiliary.chunk(3, -1)[2]), output.hidden)


def test_spec_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    spec = read_target_spec(tmp_path, torch.bfloat16)
    assert spec == load_target(tmp_path, CPU, torch.bfloat16).spec
    assert spec.kv == KvGeometry(LAYERS, KV_HEADS, HEAD_DIM, torch.bfloat16)
    assert (spec.vocab_size, spec.hidden_size, spec.max_position, spec.eos_token_ids) == (80, 32, MAX_POSITION, (2,))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_stay_near_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_tiny_model(tmp_path)
    exact = model(TOKENS[None]).logits[0]
    logits = full_forward(load_target(tmp_path, CPU, dtype), TOKENS)
    theirs = model.to(dtype)(TOKENS[None]).logits[0]
    assert logits.dtype is dtype
    assert (logits.float() - exact).abs().mean() < 1.5 * (theirs.float() - exact).abs().mean()


def test_forward_reads_nothing_back(tmp_path: Path) -> None:
    """Under FakeTensorMode a host read raises: there are no values to read."""
    save_tiny_model(tmp_path)
    target = load_target(tmp_path, CPU, torch.float32, auxiliary_layers=(1, 2, 3))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        token_ids = torch.zeros(9, dtype=torch.int64)
        output = target.forward(token_ids, token_ids, DenseAttention())
        assert output.auxiliary is not None
        assert (output.hidden.shape, output.auxiliary.shape) == ((9, 32), (9, 96))
        assert target.logits(output.hidden).shape == (9, 80)


REFUSED = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    "no architecture": ({"architectures": None}, "none named"),
    "rope type": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    "old rope type": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "incomplete rope": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lacks factor"),
    "partial rope": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
    "activation": ({"hidden_act": "gelu"}, "gelu"),
    "sliding window": ({"sliding_window": 16}, "sliding"),
    "empty window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window"),
    "unknown layers": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["linear_attention"]},
        "layer_types",
    ),
    "sliding layers": ({"layer_types": ["sliding_attention"] * LAYERS}, "sliding"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    "uneven heads": ({"num_key_value_heads": 3}, "4 attention heads"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "text for a number": ({"vocab_size": "80"}, "vocab_size"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_tiny_model(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load_target(tmp_path, CPU, torch.float32)


@torch.no_grad()
def test_the_older_spelling_of_rope_is_read(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, tiny_config(rope_parameters=LLAMA3))
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    edit_config(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    target = load_target(tmp_path, CPU, torch.float32)
    torch.testing.assert_close(full_forward(target, TOKENS), model(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)
