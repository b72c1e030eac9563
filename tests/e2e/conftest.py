from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e_helpers import Fleet, running_fleet
from e2e_model import TinyModel, save_served_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def one_of_each(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One prefill worker, one decode worker, a gateway with HTTP: for tests that leave them as they are."""
    with running_fleet(tiny.config(**{"gateway.http_port": 0}), tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet
