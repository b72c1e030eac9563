"""What all tests share."""

from __future__ import annotations

import os

# No test may reach for a model hub, and workers on shared cores must not spin: both before torch is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz", type=int, default=400, metavar="N", help="malformed requests that each fuzzing test sends (400)"
    )


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> int:
    """How many malformed requests to send."""
    return int(request.config.getoption("--fuzz"))
