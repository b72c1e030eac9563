"""Attention in plain PyTorch, for CPUs.

All query heads of a KV head fold into one batched matrix product over the gathered blocks, `[group * queries, rows]`
of scores each; a prompt's chunk is cut into tiles of queries so that its scores stay in the processor's cache. Two
products, one addition and one softmax: measured for the default model's shapes (`benchmarks/attention.py`), this beats
PyTorch's scaled_dot_product_attention from one query to a chunk of 512 in bfloat16, and equals it in float32.

A few sequences are gathered at a time, so that their rows are still in the processor's cache when they are multiplied,
and no further than the longest of them needs: with batches sorted by length, a short one doesn't pay for a long one.
"""

from __future__ import annotations

import torch

from branchline.engine.cache import BlockTables, PagedKvCache
from branchline.engine.visibility import Visibility

#: Queries that are computed at once.
TILE = 64
#: Sequences that are gathered at once.
GROUP = 8


class TorchAttention:
    """One forward pass's attention; implements `protocol.Attention`.

    slots int64 `[batch * queries]`: where each query's K and V go. `line_from`: see `PagedAttention.over`.
    """

    def __init__(
        self,
        cache: PagedKvCache,
        block_tables: BlockTables,
        slots: torch.Tensor,
        visibility: Visibility,
        line_from: int | None = None,
    ) -> None:
        assert slots.shape[0] == visibility.batch * visibility.queries, (slots.shape, visibility)
        self.cache = cache
        self.visibility = visibility
        self._line_from = line_from
        self._places = cache.places(slots)
        self._rows = block_tables.ids.shape[1] * cache.block_size
        firsts = range(0, block_tables.batch, GROUP)
        self._groups = [(first, block_tables.some(first, GROUP)) for first in firsts]
        self._biases: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        """See protocol.Attention."""
        self.cache.write(layer, self._places, key, value)
        batch, queries = self.visibility.batch, self.visibility.queries
        bias = self._bias(window, query.dtype)
        by_query = query.view(batch, queries, key.shape[1], -1, query.shape[2])
        mixed = query.new_empty(by_query.shape)
        for first, ids in self._groups:
            keys, values = self.cache.gather(layer, ids.reshape(-1), len(ids))
            for tile in range(0, queries, TILE):
                part = (slice(first, first + GROUP), slice(tile, tile + TILE))
                rows = keys.shape[1] if self._line_from is None else min(keys.shape[1], self._line_from + tile + TILE)
                seen = bias[part[0], :, part[1], :rows]
                mixed[part] = _attend(by_query[part], keys[:, :rows], values[:, :rows], seen)
        return mixed.view(query.shape)

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
