"""Attention in plain PyTorch, for CPUs.

All query heads of a KV head fold into one batched matrix product over the gathered blocks, `[group * queries, rows]`
of scores each; a prompt's chunk is cut into tiles of queries so that its scores stay in the processor's cache. Two
products, one addition and one softmax: measured for the default model's shapes (`benchmarks/attention.py`), this beats
PyTorch's scaled_dot_product_attention from one query to a chunk of 512 in bfloat16, and equals it in float32.
"""

from __future__ import annotations

import torch

from branchline.engine.cache import PagedKvCache
from branchline.engine.visibility import Visibility

#: Queries that are computed at once.
TILE = 64


class TorchAttention:
    """One forward pass's attention; implements `protocol.Attention`.

    block_table int64 `[batch, width]`; slots int64 `[batch * queries]`, where each query's K and V go.
    """

    def __init__(
        self, cache: PagedKvCache, block_table: torch.Tensor, slots: torch.Tensor, visibility: Visibility
    ) -> None:
        assert slots.shape[0] == visibility.batch * visibility.queries, (slots.shape, visibility)
        self.cache = cache
        self.visibility = visibility
        self._places = cache.places(slots)
        self._blocks = block_table.reshape(-1)
        self._rows = block_table.shape[1] * cache.block_size
        self._biases: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        """See protocol.Attention."""
        self.cache.write(layer, self._places, key, value)
        batch, queries = self.visibility.batch, self.visibility.queries
        keys, values = self.cache.gather(layer, self._blocks, batch)
        bias = self._bias(window, query.dtype)
        by_query = query.view(batch, queries, key.shape[1], -1, query.shape[2])
        if queries <= TILE:
            mixed = _attend(by_query, keys, values, bias)
        else:
            tiles = zip(torch.split(by_query, TILE, 1), torch.split(bias, TILE, 2), strict=True)
            mixed = torch.cat([_attend(tile, keys, values, seen) for tile, seen in tiles], 1)
        return mixed.reshape(query.shape)

    def _bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The mask of a window, `[batch, 1, queries, rows]`: the same for every layer that has it, so made once."""
        if window not in self._biases:
            self._biases[window] = self.visibility.bias(self._rows, window, dtype)[:, None]
        return self._biases[window]


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """query `[batch, queries, kv_heads, group, head_dim]`, keys and values `[kv_heads * batch, rows, head_dim]`, bias
    `[batch, 1, queries, rows]` -> query's shape."""
    batch, queries, kv_heads, group, head_dim = query.shape
    folded = query.permute(2, 0, 3, 1, 4).reshape(kv_heads * batch, group * queries, head_dim)
    scores = torch.bmm(folded, keys.transpose(1, 2))
    by_query = scores.view(kv_heads, batch, group, queries, -1)
    # One pass over the scores: scaled and masked in place.
    torch.add(bias, by_query, alpha=head_dim**-0.5, out=by_query)
    mixed = torch.bmm(torch.softmax(scores, -1), values)
    return mixed.view(kv_heads, batch, group, queries, head_dim).permute(1, 3, 0, 2, 4)
