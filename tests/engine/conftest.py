from __future__ import annotations

from pathlib import Path

import pytest
from engine_helpers import load_tiny, save_tiny_pair
from transformers import AutoModelForCausalLM, PreTrainedModel

from branchline.engine.models.protocol import Models


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_tiny_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_pair: tuple[Path, Path]) -> Models:
    return load_tiny(tiny_pair)


@pytest.fixture(scope="session")
def tiny_oracle(tiny_pair: tuple[Path, Path]) -> PreTrainedModel:
    """The same model in Hugging Face transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_pair[0]).eval()
