"""Real workers around tiny random models, in the test's own event loop, over gRPC on loopback."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).parent.parent / "models"))

from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config
from worker_driver import Driver, Tiny, running_workers

from branchline.config import Config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny Llama and an EAGLE-3 head on disk, with the Hugging Face model as the oracle."""
    directory = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(directory / "model", tiny_config(max_position_embeddings=512))
    head = save_head(directory / "head", head_config(), head_tensors())
    other_head = head_tensors()
    other_head["fc.weight"] = other_head["fc.weight"] * 0.5
    save_head(directory / "other_head", head_config(), other_head)
    return Tiny(directory, model, directory / "model", head, directory / "other_head")


@pytest.fixture
def config(tiny: Tiny) -> Config:
    return tiny.config()


@pytest.fixture
async def workers(config: Config) -> AsyncIterator[Driver]:
    """One prefill and one decode worker; checks that they end with nothing in use."""
    async with running_workers(config) as driver:
        yield driver
        await driver.wait_until_idle()
