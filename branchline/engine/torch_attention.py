"""Attention in plain PyTorch: for CPUs, where the new rows of a batch are few and matrix products are the cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)

from branchline.engine.cache import PagedKvCache
from branchline.engine.visibility import Visibility

#: From this many query rows on, PyTorch's fused kernel beats the two matrix products below (measured on the CPU).
FUSED_FROM_QUERIES = 64


class TorchAttention:
    """One forward pass's attention; implements `protocol.Attention`.

    block_table int64 `[batch, width]`; slots int64 `[batch * queries]`, where each query's K and V go.
    """

    def __init__(
        self, cache: PagedKvCache, block_table: torch.Tensor, slots: torch.Tensor, visibility: Visibility
    ) -> None:
        assert slots.shape[0] == visibility.batch * visibility.queries, (slots.shape, visibility)
        self.cache = cache
        self.block_table = block_table
        self.slots = slots
        self.visibility = visibility
        self._biases: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        self.cache.write(layer, self.slots, key, value)
        keys, values = self.cache.gather(layer, self.block_table)
        if self.visibility.queries >= FUSED_FROM_QUERIES:
            return self._fused(query, keys, values, window)
        return self._grouped(query, keys, values, window)

    def _grouped(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """Few queries: all query heads of a KV head fold into one batched matrix product, which adds the bias too."""
        batch, queries = self.visibility.batch, self.visibility.queries
        kv_heads, _, rows, head_dim = keys.shape
        group = query.shape[1] // kv_heads
        folded = query.view(batch, queries, kv_heads, group, head_dim).permute(2, 0, 1, 3, 4)
        folded = folded.reshape(kv_heads * batch, queries * group, head_dim)
        bias = self._folded_bias(kv_heads, group, rows, query.dtype, window)
        scores = torch.baddbmm(bias, folded, keys.view(-1, rows, head_dim).transpose(1, 2), alpha=head_dim**-0.5)
        mixed = torch.bmm(torch.softmax(scores, -1), values.view(-1, rows, head_dim))
        mixed = mixed.view(kv_heads, batch, queries, group, head_dim).permute(1, 2, 0, 3, 4)
        return mixed.reshape(batch * queries, kv_heads * group, head_dim)

    def _folded_bias(
        self, kv_heads: int, group: int, rows: int, dtype: torch.dtype, window: int | None
    ) -> torch.Tensor:
        """The bias in the shape of the folded scores, `[kv_heads * batch, queries * group, rows]`: the same for every
        layer of one window, so it is made once."""
        if window not in self._biases:
            bias = self.visibility.bias(rows, window, dtype)
            batch, queries, _ = bias.shape
            spread = bias[None, :, :, None, :].expand(kv_heads, -1, -1, group, -1)
            self._biases[window] = spread.reshape(kv_heads * batch, queries * group, rows)
        return self._biases[window]

    def _fused(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
        """Many queries, as in prefill: PyTorch's scaled_dot_product_attention."""
        batch, queries = self.visibility.batch, self.visibility.queries
        heads, head_dim = query.shape[1], query.shape[2]
        if window not in self._biases:
            self._biases[window] = self.visibility.bias(keys.shape[2], window, query.dtype)[:, None]
        mixed = F.scaled_dot_product_attention(
            query.view(batch, queries, heads, head_dim).transpose(1, 2),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=self._biases[window],
            enable_gqa=True,
        )
        return mixed.transpose(1, 2).reshape(batch * queries, heads, head_dim)
