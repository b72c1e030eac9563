"""These tests run on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1, which must be set before the first
import of triton: `tests/engine/test_kernels_interpreted.py` does that, in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from branchline.engine import attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: Without a GPU and outside the interpreter there is nothing that could run a kernel.
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    """Makes passes use the kernels, on any device, cut into these many folded queries, rows and splits."""
    from branchline.engine.triton_attention import Tiling, TritonAttention

    def choose(queries: int, rows: int, splits: int) -> None:
        tiling = Tiling(queries, rows, splits, warps=4)
        make = lambda cache, tables, slots, visibility, _: TritonAttention(  # noqa: E731
            cache, tables.ids, slots, visibility, tiling
        )
        monkeypatch.setattr(attention, "implementation", make)

    return choose
