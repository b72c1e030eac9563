from __future__ import annotations

import pytest
from e2e_model import TinyModel, save_served_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_served_model(tmp_path_factory.mktemp("served"))
