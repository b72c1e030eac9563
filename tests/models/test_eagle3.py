"""The EAGLE-3 head: against a second, dense implementation; both formats; everything that doesn't fit is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_eagle3 import dense_eagle3
from model_helpers import (
    HIDDEN,
    VOCAB,
    DenseAttention,
    head_config,
    head_tensors,
    in_speculators_names,
    save_head,
    speculators_config,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from branchline.engine.models.eagle3 import Eagle3Head, load_eagle3
from branchline.engine.models.eagle3_config import read_eagle3_config
from branchline.engine.models.protocol import KvGeometry, ModelError, TargetSpec

pytestmark = pytest.mark.models

CPU = torch.device("cpu")
TARGET = TargetSpec(
    kv=KvGeometry(8, 2, 8, torch.float64), vocab_size=VOCAB, hidden_size=HIDDEN, max_position=128, eos_token_ids=(2,)
)
EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TOKENS = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(6))
AUXILIARY = torch.randn(20, 3 * HIDDEN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
POSITIONS = torch.arange(20)


def load(directory: Path) -> Eagle3Head:
    return load_eagle3(directory, TARGET, EMBEDDING, CPU, torch.float64)


def outputs(head: Eagle3Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft logits and recurrent states over the test's rows."""
    normed, recurrent = head.forward(TOKENS, head.fuse(AUXILIARY), POSITIONS, DenseAttention())
    return head.logits(normed), recurrent


@pytest.fixture
def head_dir(tmp_path: Path) -> Path:
    return save_head(tmp_path / "head", head_config(), head_tensors())


def test_matches_the_dense_implementation(head_dir: Path) -> None:
    head, tensors = load(head_dir), head_tensors()
    fused = AUXILIARY @ tensors["fc.weight"].double().T
    expected = dense_eagle3(tensors, head_config(), EMBEDDING, TOKENS, fused)
    torch.testing.assert_close(outputs(head), expected, rtol=1e-5, atol=1e-5)


def test_recurrent_states_feed_drafted_rows(head_dir: Path) -> None:
    """A drafted row in a later pass, fed its parent's recurrent state, equals the dense pass over all rows."""
    head, attention = load(head_dir), DenseAttention()
    fused = head.fuse(AUXILIARY)
    _, recurrent = head.forward(TOKENS[:19], fused[:19], POSITIONS[:19], attention)
    normed, _ = head.forward(TOKENS[19:], recurrent[18:], POSITIONS[19:], attention)
    rows = torch.cat([fused[:19], recurrent[18:]])
    expected, _ = dense_eagle3(head_tensors(), head_config(), EMBEDDING, TOKENS, rows)
    torch.testing.assert_close(head.logits(normed), expected[19:], rtol=1e-5, atol=1e-5)


def test_both_formats_and_both_containers_load_the_same(head_dir: Path, tmp_path: Path) -> None:
    expected = outputs(load(head_dir))
    speculators = save_head(tmp_path / "speculators", speculators_config(), in_speculators_names(head_tensors()))
    torch.testing.assert_close(outputs(load(speculators)), expected, rtol=0, atol=0)
    (head_dir / "model.safetensors").unlink()
    torch.save(head_tensors(), head_dir / "pytorch_model.bin")
    torch.testing.assert_close(outputs(load(head_dir)), expected, rtol=0, atol=0)


def test_spec_and_vocabulary(head_dir: Path) -> None:
    head = load(head_dir)
    assert head.spec.kv == KvGeometry(1, 2, 8, torch.float64)
    assert (head.spec.hidden_size, head.spec.draft_vocab_size) == (HIDDEN, 40)
    assert head.target_token_ids.tolist() == list(range(0, 80, 2))
    assert head.embedding is EMBEDDING


def test_without_d2t_draft_ids_are_token_ids(tmp_path: Path) -> None:
    tensors = head_tensors(VOCAB)
    del tensors["d2t"], tensors["t2d"]
    head = load(save_head(tmp_path / "head", head_config(draft_vocab_size=None), tensors))
    assert head.target_token_ids.tolist() == list(range(VOCAB))


def test_the_heads_own_embedding_wins(head_dir: Path, tmp_path: Path) -> None:
    own = save_head(tmp_path / "own", head_config(), head_tensors() | {"embed_tokens.weight": EMBEDDING.flip(0)})
    flipped = load_eagle3(head_dir, TARGET, EMBEDDING.flip(0), CPU, torch.float64)
    torch.testing.assert_close(outputs(load(own)), outputs(flipped), rtol=0, atol=0)
    assert not torch.equal(outputs(load(own))[0], outputs(load(head_dir))[0])


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def speculators_head(tmp_path: Path, extra: dict[str, torch.Tensor], **changes: Any) -> Eagle3Head:
    tensors = in_speculators_names(head_tensors() | extra)
    return load(save_head(tmp_path / "variant", speculators_config(**changes), tensors))


def test_variant_norm_before_residual(tmp_path: Path) -> None:
    tensors = head_tensors()
    fused = AUXILIARY @ tensors["fc.weight"].double().T
    expected = dense_eagle3(tensors, head_config(), EMBEDDING, TOKENS, fused, norm_before_residual=True)
    head = speculators_head(tmp_path, {}, norm_before_residual=True)
    torch.testing.assert_close(outputs(head), expected, rtol=1e-5, atol=1e-5)


def test_speculators_heads_norm_before_the_residual_unless_they_say_not(tmp_path: Path) -> None:
    config = speculators_config()
    del config["norm_before_residual"]
    assert read_eagle3_config(save_head(tmp_path / "head", config, head_tensors())).norm_before_residual


def test_variant_norm_before_fc(head_dir: Path, tmp_path: Path) -> None:
    weight = torch.rand(3 * HIDDEN) + 0.5
    head = speculators_head(tmp_path, {"input_norm.weight": weight}, norm_before_fc=True)
    expected = load(head_dir).fuse(norm(AUXILIARY, weight.double()))
    torch.testing.assert_close(head.fuse(AUXILIARY), expected)


def test_variant_fc_norm(head_dir: Path, tmp_path: Path) -> None:
    weights = {f"fc_norm.{index}.weight": torch.rand(HIDDEN) + 0.5 for index in range(3)}
    head = speculators_head(tmp_path, weights, fc_norm=True)
    parts = zip(AUXILIARY.chunk(3, -1), weights.values(), strict=True)
    expected = load(head_dir).fuse(torch.cat([norm(part, weight.double()) for part, weight in parts], -1))
    torch.testing.assert_close(head.fuse(AUXILIARY), expected)


def test_variant_norm_output(head_dir: Path, tmp_path: Path) -> None:
    head = speculators_head(tmp_path, {}, norm_output=True)
    logits, recurrent = outputs(head)
    torch.testing.assert_close(logits, outputs(load(head_dir))[0])
    torch.testing.assert_close(head.logits(recurrent), logits)


def test_layers_to_fuse(head_dir: Path, tmp_path: Path) -> None:
    config = read_eagle3_config(head_dir)
    assert config.layers_to_fuse(30) == (2, 15, 27)
    named = save_head(tmp_path / "a", head_config(eagle_aux_hidden_state_layer_ids=[5, 1, 3]), head_tensors())
    assert read_eagle3_config(named).layers_to_fuse(6) == (1, 3, 5)
    inner = head_config(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 6]})
    assert read_eagle3_config(save_head(tmp_path / "b", inner, head_tensors())).layers_to_fuse(6) == (0, 1, 6)
    with pytest.raises(ModelError, match=r"\[5, 1, 3\].*target's 4"):
        read_eagle3_config(named).layers_to_fuse(4)
    with pytest.raises(ModelError, match="not three"):
        config.layers_to_fuse(4)


def test_head_reads_nothing_back(head_dir: Path) -> None:
    head = load(head_dir)
    with FakeTensorMode(allow_non_fake_inputs=True):
        token_ids = torch.zeros(5, dtype=torch.int64)
        hidden = head.fuse(torch.zeros(5, 3 * HIDDEN, dtype=torch.float64))
        normed, recurrent = head.forward(token_ids, hidden, token_ids, DenseAttention())
        assert recurrent.shape == (5, HIDDEN)
        assert head.logits(normed).shape == (5, 40)


CONFIG_REFUSED = {
    "another hidden size": ({"hidden_size": 64}, "hidden size 64 differs from the model's 32"),
    "another target's": ({"target_hidden_size": 48}, "hidden size 48 differs from the model's 32"),
    "more tokens than the target": ({"draft_vocab_size": 100}, "vocabulary of 100 exceeds the model's 80"),
    "two layers": ({"num_hidden_layers": 2}, "2 layers"),
    "another kind of layer": ({"model_type": "qwen3"}, "qwen3"),
    "another kind of head": ({"speculators_model_type": "eagle"}, "type eagle"),
    "speculators without a layer": ({"speculators_model_type": "eagle3"}, "transformer_layer_config"),
    "both kinds of norm": ({"norm_before_fc": True, "fc_norm": True}, "both"),
    "another draft vocabulary": ({"draft_vocab_size": 39}, r"d2t has shape \[40\], config.json asks for \[39\]"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIG_REFUSED.values(), ids=CONFIG_REFUSED.keys())
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    directory = save_head(tmp_path / "head", head_config(**changes), head_tensors())
    with pytest.raises(ModelError, match=message):
        load(directory)


TENSORS_REFUSED = {
    "beyond the vocabulary": ({"d2t": torch.full((40,), 60)}, "ids 60 to 99, the model's vocabulary has 80"),
    "below zero": ({"d2t": torch.full((40,), -1)}, "ids -1 to 38"),
    "few embeddings": ({"embed_tokens.weight": torch.zeros(79, HIDDEN)}, "79 tokens, the model's vocabulary has 80"),
    "an EAGLE-1 head's fc": ({"fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN)}, r"fc.weight has shape \[32, 64\]"),
    "query norms": ({"midlayer.self_attn.q_norm.weight": torch.zeros(8)}, "doesn't have: midlayer.self_attn.q_norm"),
}


@pytest.mark.parametrize(("extra", "message"), TENSORS_REFUSED.values(), ids=TENSORS_REFUSED.keys())
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, extra: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(save_head(tmp_path / "head", head_config(), head_tensors() | extra))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = head_tensors()
    del tensors["midlayer.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"midlayer\.mlp\.up_proj\.weight is missing"):
        load(save_head(tmp_path / "head", head_config(), tensors))


def test_a_smaller_target_vocabulary_is_refused(head_dir: Path) -> None:
    smaller = dataclasses.replace(TARGET, vocab_size=78)
    with pytest.raises(ModelError, match="ids 0 to 78, the model's vocabulary has 78"):
        load_eagle3(head_dir, smaller, EMBEDDING, CPU, torch.float64)
