"""Why a tree costs what it does on a CPU: a model's matrix products alone, for one row and for a tree's rows.

A GPU reads the weights as long as it takes whatever is done with them, so a few rows cost what one does. A CPU's cores
are soon busy multiplying. How many rows that takes is the machine's own, and the matrix kernels': with oneDNN's, which
both providers use, what an engine adds (attention, norms, drafting) comes on top of these times.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from branchline.engine.models.linear import Linear, linear
from branchline.engine.models.reference_config import DecoderConfig

_WARM_UP = 3


def measure(config: DecoderConfig, dtype: torch.dtype, nodes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Milliseconds of one pass's products for a plain step and for trees of `nodes`, in turn; the ratios are medians of
    the rounds' own."""
    products = _products(config, dtype)
    rows = [1, *(count + 1 for count in nodes)]
    inputs = {count: [torch.randn(count, width).to(dtype) for width, _ in products] for count in rows}
    seconds: dict[int, list[float]] = {count: [] for count in rows}
    for _, count in itertools.product(range(_WARM_UP + rounds), rows):
        began = time.perf_counter()
        for x, (_, product) in zip(inputs[count], products, strict=True):
            product(x)
        seconds[count].append(time.perf_counter() - began)
    return {
        "rounds": rounds,
        "by_rows": [
            {
                "rows": count,
                "ms": round(1e3 * statistics.median(taken[_WARM_UP:]), 4),
                "to_one_row": round(statistics.median(a / b for a, b in _pairs(taken, seconds[1])), 4),
            }
            for count, taken in seconds.items()
        ],
    }


def _pairs(a: list[float], b: list[float]) -> list[tuple[float, float]]:
    return list(zip(a, b, strict=True))[_WARM_UP:]


def _products(config: DecoderConfig, dtype: torch.dtype) -> list[tuple[int, Linear]]:
    """Random weights of every projection, in the order of a pass, with the inputs' width: each layer has its own, so
    that they come from memory as a model's do."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    layer = [(hidden, sum(config.qkv_sizes)), (heads, hidden), (hidden, 2 * inner), (inner, hidden)]
    shapes = [*(layer * config.num_layers), (hidden, config.vocab_size)]
    return [(width, linear(torch.randn(outputs, width).to(dtype))) for width, outputs in shapes]
