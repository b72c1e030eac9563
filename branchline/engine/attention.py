"""Attention over the paged cache: one entry, and an implementation for each kind of device."""

from __future__ import annotations

import torch

from branchline.engine.cache import BlockTables, PagedKvCache, null_unless, slots_of
from branchline.engine.models.protocol import Attention
from branchline.engine.torch_attention import TorchAttention
from branchline.engine.visibility import Visibility


class PagedAttention:
    """Makes the attention of one forward pass, for any set of new rows: a prompt's chunk, a tree, a drafting level."""

    @staticmethod
    def over(
        cache: PagedKvCache,
        block_tables: BlockTables,
        base: torch.Tensor,
        start: torch.Tensor,
        ancestors: torch.Tensor,
        offsets: torch.Tensor,
        keep: torch.Tensor,
        *,
        depths: torch.Tensor | None = None,
        line_from: int | None = None,
    ) -> Attention:
        """For queries whose own rows lie at base + offsets.

        base, start int64 `[batch]`; ancestors bool `[batch or 1, queries, new]`;
        offsets int64 and keep bool `[batch or 1, queries]`: a query that is not kept writes to the null block. depths
        int64 `[batch or 1, new]`, the new rows' positions less `base`, matters to layers with a sliding window alone;
        by default the new rows are a line. `line_from`, where the host knows it: in every sequence the queries are rows
        from this one on, one after the other, and none sees a later one than itself, so those needn't be looked at.
        """
        visibility = Visibility.of(base, start, ancestors, offsets, depths)
        slots = slots_of(block_tables.ids, base[:, None] + offsets, cache.block_size)
        slots = null_unless(keep, slots).reshape(-1)
        return implementation(cache, block_tables, slots, visibility, line_from)


def implementation(
    cache: PagedKvCache,
    block_tables: BlockTables,
    slots: torch.Tensor,
    visibility: Visibility,
    line_from: int | None = None,
) -> Attention:
    """The attention of a pass, on the cache's device."""
    if cache.storage.is_cuda:
        from branchline.engine.triton_attention import TritonAttention  # triton exists on GPU machines alone

        return TritonAttention(cache, block_tables.ids, slots, visibility)
    return TorchAttention(cache, block_tables, slots, visibility, line_from)
