"""Attention over the paged cache, for any set of new rows: a prompt's chunk, a draft tree, a drafting level.

All three are the same picture. A sequence has a context, the rows `start … base - 1` of the cache, seen by every
query; behind it lie new rows at `base`, `base + 1`, …, each seen only by the queries that descend from it. For a chunk
of a prompt that relation is a triangle; for a tree it is ancestor-or-self.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)

from branchline.engine.cache import PagedKvCache, null_unless, slots_of

#: Added to the scores of rows that a query may not see. Finite: a padded query that sees nothing stays finite too,
#: so that nothing it writes to the null block can spoil a neighbour's sum (0 * NaN is NaN).
MASKED = -1e30

#: From this many query rows on, PyTorch's fused kernel beats the two matrix products below (measured on the CPU).
FUSED_FROM_QUERIES = 64


def attention_bias(
    base: torch.Tensor, start: torch.Tensor, ancestors: torch.Tensor, rows: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The additive mask, `[batch, queries, rows]`: base, start int64 `[batch]`, ancestors bool `[batch, queries, new]`.

    Row r is visible when start <= r < base, or when it is a new row, r - base < new, that `ancestors` allows.
    """
    new = ancestors.shape[2]
    row = torch.arange(rows, device=base.device)
    offset = row - base[:, None]
    context = (offset < 0) & (row >= start[:, None])
    index = offset.clamp(0, new - 1)[:, None, :].expand(-1, ancestors.shape[1], -1)
    inside = ((offset >= 0) & (offset < new))[:, None, :]
    visible = context[:, None, :] | (inside & ancestors.gather(2, index))
    return torch.zeros(visible.shape, dtype=dtype, device=base.device).masked_fill_(~visible, MASKED)


class PagedAttention:
    """One forward pass's attention; implements `protocol.Attention`.

    block_table int64 `[batch, width]`; slots int64 `[batch * queries]`, where each query's K and V go; bias
    `[batch, queries, width * block_size]`.
    """

    def __init__(self, cache: PagedKvCache, block_table: torch.Tensor, slots: torch.Tensor, bias: torch.Tensor) -> None:
        assert bias.shape[2] == block_table.shape[1] * cache.block_size, (bias.shape, block_table.shape)
        assert slots.shape[0] == bias.shape[0] * bias.shape[1], (slots.shape, bias.shape)
        self.cache = cache
        self.block_table = block_table
        self.slots = slots
        self.bias = bias
        self._folded: torch.Tensor | None = None

    @classmethod
    def over(
        cls,
        cache: PagedKvCache,
        block_table: torch.Tensor,
        base: torch.Tensor,
        start: torch.Tensor,
        ancestors: torch.Tensor,
        offsets: torch.Tensor,
        keep: torch.Tensor,
    ) -> PagedAttention:
        """For queries whose own rows lie at base + offsets.

        base, start int64 `[batch]`; ancestors bool `[batch or 1, queries, new]`; offsets int64 and keep bool
        `[batch or 1, queries]`: a query that is not kept writes to the null block.
        """
        batch, width = block_table.shape
        slots = slots_of(block_table, base[:, None] + offsets, cache.block_size)
        slots = null_unless(keep, slots).reshape(-1)
        bias = attention_bias(base, start, ancestors.expand(batch, -1, -1), width * cache.block_size)
        return cls(cache, block_table, slots, bias)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.slots, key, value)
        keys, values = self.cache.gather(layer, self.block_table)
        if self.bias.shape[1] >= FUSED_FROM_QUERIES:
            return self._fused(query, keys, values)
        return self._grouped(query, keys, values)

    def _grouped(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Few queries: all query heads of a KV head fold into one batched matrix product, which adds the bias too."""
        batch, queries, rows = self.bias.shape
        kv_heads, head_dim = keys.shape[0], keys.shape[3]
        group = query.shape[1] // kv_heads
        folded = query.view(batch, queries, kv_heads, group, head_dim).permute(2, 0, 1, 3, 4)
        folded = folded.reshape(kv_heads * batch, queries * group, head_dim)
        bias = self._folded_bias(kv_heads, group, query.dtype)
        scores = torch.baddbmm(bias, folded, keys.view(-1, rows, head_dim).transpose(1, 2), alpha=head_dim**-0.5)
        mixed = torch.bmm(torch.softmax(scores, -1), values.view(-1, rows, head_dim))
        mixed = mixed.view(kv_heads, batch, queries, group, head_dim).permute(1, 2, 0, 3, 4)
        return mixed.reshape(batch * queries, kv_heads * group, head_dim)

    def _folded_bias(self, kv_heads: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        """The bias in the shape of the folded scores, `[kv_heads * batch, queries * group, rows]`: the same for every
        layer, so it is made once."""
        if self._folded is None:
            batch, queries, rows = self.bias.shape
            spread = self.bias.to(dtype)[None, :, :, None, :].expand(kv_heads, -1, -1, group, -1)
            self._folded = spread.reshape(kv_heads * batch, queries * group, rows)
        return self._folded

    def _fused(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Many queries, as in prefill: PyTorch's scaled_dot_product_attention."""
        batch, queries, _ = self.bias.shape
        heads, head_dim = query.shape[1], query.shape[2]
        mixed = F.scaled_dot_product_attention(
            query.view(batch, queries, heads, head_dim).transpose(1, 2),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            attn_mask=self.bias[:, None].to(query.dtype),
            enable_gqa=True,
        )
        return mixed.transpose(1, 2).reshape(batch * queries, heads, head_dim)
