"""Runs the kernels' tests in Triton's interpreter: in a process of their own, since its switch must be set before
triton is imported and changes every kernel of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.models

KERNELS = Path(__file__).parent / "kernels"


@pytest.mark.parametrize("file", sorted(KERNELS.glob("test_*.py")), ids=lambda path: path.stem)
def test_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
