"""Checkpoints that are incomplete, damaged or of another model; and what the fingerprint sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_helpers import HIDDEN, edit_config, edit_tensors, head_config, head_tensors, save_head, save_tiny_model
from safetensors.torch import load_file

from branchline.core import Fingerprint
from branchline.engine.models.checkpoint import Weights, read_config, read_eos_token_ids
from branchline.engine.models.checkpoint_fingerprint import SAMPLER_VERSION, fingerprint
from branchline.engine.models.protocol import KvGeometry, ModelError
from branchline.engine.models.reference import load_target

CPU = torch.device("cpu")
NORM = "model.layers.3.input_layernorm.weight"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    return tmp_path / "model"


def refused(directory: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_target(directory, CPU, torch.float32)


def test_a_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: no such model directory")


def test_no_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    refused(model_dir, r"no config\.json")


@pytest.mark.parametrize(("text", "message"), [("{", "not readable as JSON"), ("[]", "not a JSON object")])
def test_a_damaged_config(model_dir: Path, text: str, message: str) -> None:
    (model_dir / "config.json").write_text(text)
    refused(model_dir, message)


def test_no_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    refused(model_dir, "no weights")


def test_truncated_weights(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(model_dir, "not a readable safetensors file")


def test_a_missing_tensor_is_named(model_dir: Path) -> None:
    edit_tensors(model_dir, drop=(NORM,))
    refused(model_dir, "layers.3.input_layernorm.weight is missing")


def test_a_wrong_shape_is_named_with_both_shapes(model_dir: Path) -> None:
    edit_tensors(model_dir, {NORM: torch.ones(31)})
    refused(model_dir, r"layers\.3\.input_layernorm\.weight has shape \[31\], config\.json asks for \[32\]")


def test_a_tensor_that_the_model_lacks_is_named(model_dir: Path) -> None:
    edit_tensors(model_dir, {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    refused(model_dir, r"doesn't have: model\.layers\.0\.self_attn\.q_norm\.weight")


def test_old_rotary_buffers_are_ignored(model_dir: Path) -> None:
    edit_tensors(model_dir, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load_target(model_dir, CPU, torch.float32)


def split_into_shards(directory: Path) -> None:
    """Rewrites a checkpoint as two shards with an index, as large models come."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file_name, part in shards.items():
        save_head(directory / "part", {}, {name: tensors[name] for name in part})
        (directory / "part" / "model.safetensors").rename(directory / file_name)
    weight_map = {name: file_name for file_name, part in shards.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_load_like_one_file(model_dir: Path) -> None:
    whole = load_target(model_dir, CPU, torch.float32)
    split_into_shards(model_dir)
    sharded = load_target(model_dir, CPU, torch.float32)
    hidden = torch.randn(3, HIDDEN)
    assert torch.equal(whole.layers[5].mlp(hidden), sharded.layers[5].mlp(hidden))


def test_a_missing_shard_is_named(model_dir: Path) -> None:
    split_into_shards(model_dir)
    (model_dir / "model-2-of-2.safetensors").unlink()
    refused(model_dir, "weights missing: model-2-of-2.safetensors")


def test_a_damaged_pickle(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(ModelError, match="not a readable PyTorch checkpoint"):
        Weights(tmp_path)


def test_eos_ids_come_from_the_generation_config_first(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read_eos_token_ids(model_dir) == (3, 4)
    (model_dir / "generation_config.json").unlink()
    assert read_eos_token_ids(model_dir) == (2,)
    edit_config(model_dir, eos_token_id=None)
    assert read_eos_token_ids(model_dir) == ()


def take(model_dir: Path, draft_dir: Path | None = None, dtype: torch.dtype = torch.float32) -> Fingerprint:
    return fingerprint(model_dir, draft_dir, KvGeometry(8, 2, 8, dtype), 80, dtype)


def test_a_copy_has_the_same_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "elsewhere")
    edit_config(copy, transformers_version="0.0", dtype="bfloat16")
    assert take(copy) == take(model_dir)
    assert take(model_dir).target == take(model_dir).target | {
        "dtype": "float32",
        "kv_dtype": "float32",
        "kv_geometry": "8 layers, 2 KV heads of 8",
        "vocab_size": "80",
        "sampler_version": SAMPLER_VERSION,
    }


@pytest.mark.parametrize(
    ("field", "changes"), [("rope", {"rope_parameters": {"rope_theta": 5e5}}), ("weights", {"rms_norm_eps": 0.5})]
)
def test_a_changed_config_shows(model_dir: Path, tmp_path: Path, field: str, changes: dict[str, object]) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "elsewhere")
    edit_config(copy, **changes)
    assert take(model_dir).target[field] != take(copy).target[field]


@pytest.mark.parametrize("index", [0, -1])
def test_changed_weights_show(model_dir: Path, tmp_path: Path, index: int) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "elsewhere")
    weight = load_file(copy / "model.safetensors")["model.layers.7.mlp.up_proj.weight"]
    weight.view(-1)[index] += 1e-3
    edit_tensors(copy, {"model.layers.7.mlp.up_proj.weight": weight})
    assert (take(model_dir).difference(take(copy)) or "").startswith("weights: ")


def test_training_a_large_tensor_shows(tmp_path: Path) -> None:
    """Samples see a change of every value, as training makes, in a tensor too large to be read whole."""
    table = torch.zeros(400, 1000)
    before = save_head(tmp_path / "a", {"hidden_size": 1}, {"table": table})
    after = save_head(tmp_path / "b", {"hidden_size": 1}, {"table": table + 1e-3})
    assert (take(before).difference(take(after)) or "").startswith("weights: ")


def test_the_dtype_shows(model_dir: Path) -> None:
    assert (take(model_dir).difference(take(model_dir, dtype=torch.bfloat16)) or "").startswith("dtype: ")


def test_a_draft_head_is_apart_from_the_target(model_dir: Path, tmp_path: Path) -> None:
    head = save_head(tmp_path / "head", head_config(), head_tensors())
    other = save_head(tmp_path / "other", head_config(), head_tensors() | {"norm.weight": torch.ones(32)})
    prints = [take(model_dir), take(model_dir, head), take(model_dir, other)]
    assert prints[0].draft == ""
    assert len({each.draft for each in prints}) == 3
    assert all(each.difference(prints[0]) is None for each in prints)


def test_a_damaged_file_has_no_fingerprint(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="not readable"):
        take(model_dir)


def test_configs_are_read_as_they_are(model_dir: Path) -> None:
    assert read_config(model_dir)["architectures"] == ["LlamaForCausalLM"]
