"""Attention in Triton, for GPUs: the context split along its length, so that a long one at batch 1 fills the device
(flash-decoding: Dao et al. 2023), trees by bit masks, all lengths read on the device. It needs no host read and
allocates from PyTorch's pool alone, so it can be captured in a CUDA graph."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from branchline.engine.cache import PagedKvCache
from branchline.engine.triton_kernels import WORD, attend_split, combine_splits, pack_ancestors, write_rows
from branchline.engine.visibility import Visibility

#: A split shorter than this costs more in combining than it gains.
ROWS_PER_SPLIT = 128
MAX_SPLITS = 64
#: Programs per multiprocessor that are worth starting.
WAVES = 2


@dataclass(frozen=True)
class Tiling:
    """How a pass is cut: `rows` of the cache and `queries` (query heads of a KV head folded in) per step of a program,
    and into how many `splits` a context may fall. Follows from static shapes alone."""

    queries: int
    rows: int
    splits: int
    warps: int

    @classmethod
    def of(cls, visibility: Visibility, cache: PagedKvCache, group: int, capacity: int) -> Tiling:
        """capacity: the most rows that a block table holds."""
        geometry = cache.geometry
        folded = visibility.queries * group
        queries = min(max(16, triton.next_power_of_2(folded)), 64)
        wide = triton.next_power_of_2(geometry.head_dim) * geometry.dtype.itemsize
        rows = max(16, min(64, 16384 // wide))  # 16 KiB of K and of V each, per stage
        programs = visibility.batch * geometry.num_kv_heads * -(-folded // queries)
        wanted = -(-WAVES * multiprocessors(cache.storage.device) // programs)
        most = min(MAX_SPLITS, -(-capacity // ROWS_PER_SPLIT))
        return cls(queries, rows, max(1, min(wanted, most)), 4 if queries * wide <= 8192 else 8)


class TritonAttention:
    """One forward pass's attention; implements `protocol.Attention`.

    block_table int64 `[batch, width]`; slots int64 `[batch * queries]`, where each query's K and V go; `tiling` is
    chosen by shape unless given.
    """

    def __init__(
        self,
        cache: PagedKvCache,
        block_table: torch.Tensor,
        slots: torch.Tensor,
        visibility: Visibility,
        tiling: Tiling | None = None,
    ) -> None:
        assert slots.shape[0] == visibility.batch * visibility.queries, (slots.shape, visibility)
        self.cache = cache
        self.block_table = block_table.contiguous()
        self.slots = slots.contiguous()
        self.visibility = visibility
        self.tiling = tiling
        self._words, self._reach = _pack(visibility.ancestors)
        self._depths = visibility.depths.contiguous()
        self._query_depths = visibility.query_depths.contiguous()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        """See protocol.Attention."""
        self._write(layer, key, value)
        query = _dense_heads(query)
        tokens, heads, head_dim = query.shape
        visibility, storage = self.visibility, self.cache.storage[layer]
        kv_heads = storage.shape[1]
        group, width = heads // kv_heads, self.block_table.shape[1]
        tiling = self.tiling or Tiling.of(visibility, self.cache, group, width * self.cache.block_size)
        out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
        parts = (tokens, heads, tiling.splits) if tiling.splits > 1 else (0,)
        part_max, part_sum = torch.empty((2, *parts), dtype=torch.float32, device=query.device)
        part_out = torch.empty((*parts, head_dim), dtype=torch.float32, device=query.device)
        block_d = max(16, triton.next_power_of_2(head_dim))
        grid = (visibility.batch * kv_heads, -(-visibility.queries * group // tiling.queries), tiling.splits)
        attend_split[grid](
            query,
            storage[0],
            storage[1],
            out,
            part_max,
            part_sum,
            part_out,
            self.block_table,
            visibility.base,
            visibility.start,
            self._words,
            self._reach,
            self._depths,
            self._query_depths,
            math.log2(math.e) / math.sqrt(head_dim),
            visibility.queries,
            width,
            visibility.new,
            0 if window is None else window,
            query.stride(0),
            storage.stride(1),
            _by_sequence(visibility.ancestors, visibility.queries),
            _by_sequence(self._depths, visibility.new),
            _by_sequence(self._query_depths, visibility.queries),
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            word_count=self._words.shape[1],
            block_size=self.cache.block_size,
            splits=tiling.splits,
            windowed=window is not None,
            product=_product_type(query),
            block_m=tiling.queries,
            block_n=tiling.rows,
            block_d=block_d,
            num_warps=tiling.warps,
            num_stages=2,
        )
        if tiling.splits > 1:
            block_s = triton.next_power_of_2(tiling.splits)
            combine_splits[(tokens * heads,)](
                part_max, part_sum, part_out, out, head_dim, tiling.splits, block_s, block_d, num_warps=4
            )
        return out

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        key, value = _dense_heads(key), _dense_heads(value)
        tokens, heads, head_dim = key.shape
        storage = self.cache.storage[layer]
        write_rows[(tokens,)](
            storage[0],
            storage[1],
            key,
            value,
            self.slots,
            key.stride(0),
            value.stride(0),
            storage.stride(1),
            heads,
            head_dim,
            triton.next_power_of_2(heads),
            triton.next_power_of_2(head_dim),
            num_warps=4,
        )


def _pack(ancestors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool `[batch or 1, queries, new]` -> words int64 `[batch or 1 * queries, words]`, reach int32 of each query."""
    ancestors = ancestors.contiguous()
    lines, new = ancestors.shape[0] * ancestors.shape[1], ancestors.shape[2]
    count = -(-new // WORD.value)
    words = torch.empty((lines, count), dtype=torch.int64, device=ancestors.device)
    reach = torch.empty(lines, dtype=torch.int32, device=ancestors.device)
    pack_ancestors[(lines,)](ancestors, words, reach, new, count, triton.next_power_of_2(count))
    return words, reach


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, head_dim]` with each token's heads dense: a part of a merged projection is taken as it is."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _product_type(query: torch.Tensor) -> tl.dtype:
    """The type that the kernel multiplies. Triton's interpreter can't multiply bfloat16."""
    if query.dtype is torch.bfloat16:
        return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return tl.float16 if query.dtype is torch.float16 else tl.float32


def _by_sequence(tensor: torch.Tensor, stride: int) -> int:
    """The stride between sequences of a tensor that may be the same for all."""
    return stride if tensor.shape[0] > 1 else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """1 without CUDA, where the kernels run in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
