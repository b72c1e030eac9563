"""The KV rewind as one kernel launch, for GPUs."""

from __future__ import annotations

import torch
import triton

from branchline.engine.triton_kernels import move_rows


def move(storage: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """`PagedKvCache.move`: storage `[layers, 2, kv_heads, slots, head_dim]`, source and target int64 `[batch, n]`.

    A program owns one request's rows in one layer's K or V of one head; it has read them all before it writes.
    """
    layers, _, kv_heads, _, head_dim = storage.shape
    batch, count = source.shape
    move_rows[(layers * 2 * kv_heads, batch)](
        storage,
        source.contiguous(),
        target.contiguous(),
        count,
        storage.stride(2),
        head_dim,
        triton.next_power_of_2(count),
        triton.next_power_of_2(head_dim),
        num_warps=4,
    )
