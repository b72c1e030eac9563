"""`load_models` with the reference provider, on tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config

from branchline.config import EngineConfig, ModelConfig
from branchline.engine.models.load import load_models, pick_device
from branchline.engine.models.protocol import ModelError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def head_dir(tmp_path: Path) -> Path:
    return save_head(tmp_path / "head", head_config(), head_tensors())


def config(model: Path, draft: Path | str = "default") -> ModelConfig:
    return ModelConfig(model=str(model), draft=str(draft), dtype="float32", provider="reference", device="cpu")


def test_target_and_head(model_dir: Path, head_dir: Path) -> None:
    steps: list[str] = []
    models = load_models(config(model_dir, head_dir), EngineConfig(), steps.append)
    assert models.draft is not None
    assert models.fingerprint.draft
    assert (models.device, models.dtype) == (torch.device("cpu"), torch.float32)
    assert [step.split()[0] for step in steps][-2:] == ["loading", "loading"]


@pytest.mark.parametrize("draft", ["none", "default"])
def test_a_model_of_ones_own_has_no_head_by_default(model_dir: Path, draft: str) -> None:
    models = load_models(config(model_dir, draft), EngineConfig())
    assert models.draft is None
    assert models.fingerprint.draft == ""


def test_threads_are_set_only_when_asked_for(model_dir: Path) -> None:
    before = torch.get_num_threads()
    try:
        load_models(config(model_dir), EngineConfig(threads=0))
        assert torch.get_num_threads() == before
        load_models(config(model_dir), EngineConfig(threads=before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_head_of_another_hidden_size_is_refused_before_weights_are_read(model_dir: Path, tmp_path: Path) -> None:
    head = tiny_config(hidden_size=64, num_hidden_layers=1).to_dict()
    head_dir = save_head(tmp_path / "head", head, {})
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="hidden size 64 differs from the model's 32"):
        load_models(config(model_dir, head_dir), EngineConfig())


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no GPU"):
        pick_device("cuda")
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
