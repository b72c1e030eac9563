"""The engine's Triton kernels: device code alone. `triton_attention.py` and `triton_rewind.py` launch them.

Names: a *row* is a place in a sequence, found in the cache through the block table; a *tile* is a block of folded
queries, the `group` query heads of a KV head side by side for each query: m = query * group + head in the group.
Loads of heads whose size is no power of two are padded with zeros to `block_d`.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Bits of a mask word.
WORD = tl.constexpr(64)
#: Below every score; finite, so that a tile which sees nothing never subtracts infinities.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def write_rows(
    keys,
    values,
    key,
    value,
    slots,
    key_stride,
    value_stride,
    head_stride,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_h: tl.constexpr,
    block_d: tl.constexpr,
):
    """One new token's K and V, of all heads, into its slot of a layer's rows `[heads, slots, head_dim]`.

    Grid: tokens. key and value `[tokens, heads, head_dim]` with these strides between tokens.
    """
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    head = tl.arange(0, block_h)[:, None]
    dim = tl.arange(0, block_d)[None, :]
    inside = (head < heads) & (dim < head_dim)
    here = head * head_dim + dim
    there = head.to(tl.int64) * head_stride + slot * head_dim + dim
    tl.store(keys + there, tl.load(key + token.to(tl.int64) * key_stride + here, mask=inside), mask=inside)
    tl.store(values + there, tl.load(value + token.to(tl.int64) * value_stride + here, mask=inside), mask=inside)


@triton.jit
def pack_ancestors(ancestors, words, reach, new, count: tl.constexpr, block_w: tl.constexpr):
    """A query's row of `ancestors`, bool `[batch * queries, new]`, as `count` words of 64 bits, the lowest bit first;
    and `reach`, one more than the last new row that it sees. Grid: batch * queries."""
    query = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, block_w)[:, None]
    bit = tl.arange(0, WORD)[None, :]
    offset = word * WORD + bit
    seen = tl.load(ancestors + query * new + offset, mask=offset < new, other=0) != 0
    packed = tl.sum(seen.to(tl.int64) << bit.to(tl.int64), 1)
    which = tl.arange(0, block_w)
    tl.store(words + query * count + which, packed, mask=which < count)
    tl.store(reach + query, tl.max(tl.max(tl.where(seen, offset + 1, 0), 1), 0))


@triton.jit
def attend_split(
    query,
    keys,
    values,
    out,
    part_max,
    part_sum,
    part_out,
    block_table,
    base,
    start,
    words,
    reach,
    depths,
    query_depths,
    scale,
    queries,
    width,
    new,
    window,
    query_stride,
    head_stride,
    mask_stride,
    depth_stride,
    query_depth_stride,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    word_count: tl.constexpr,
    block_size: tl.constexpr,
    splits: tl.constexpr,
    windowed: tl.constexpr,
    product: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
):
    """One tile of a sequence's queries against one part of the rows that they may see, by online softmax.

    Grid: (batch * kv_heads, tiles, splits). The parts are cut by the lengths on the device: with a block table of full
    width a short sequence keeps few parts busy, and the others end at once. With one split the result goes to `out`;
    with more, each part's maximum, sum (float32) and unnormalised result (float32) wait for `combine_splits`.

    query, out `[batch * queries, heads, head_dim]`, `query_stride` between query's tokens, out contiguous; keys, values
    `[kv_heads, slots, head_dim]`; words int64 and reach int32 from `pack_ancestors`, by sequence at `mask_stride`
    queries; scale = log2(e) / sqrt(head_dim); `product` is the type that is multiplied, the cache's.
    """
    tl.static_assert(block_n <= WORD)
    sequence = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    split = tl.program_id(2)

    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    number = m // group
    real = number < queries
    token = sequence.to(tl.int64) * queries + number
    head = kv_head * group + m % group
    dim = tl.arange(0, block_d)
    inside = dim < head_dim

    length = tl.load(base + sequence).to(tl.int32)
    oldest = tl.load(start + sequence).to(tl.int32)
    mask_row = sequence * mask_stride + number
    end = length + tl.max(tl.load(reach + mask_row, mask=real, other=0), 0)
    end = tl.minimum(end, width * block_size)
    first = oldest
    depth_m = tl.zeros([block_m], tl.int32)
    if windowed:
        depth_m_at = query_depths + sequence * query_depth_stride + number
        depth_m = tl.load(depth_m_at, mask=real, other=2147483647).to(tl.int32)
        first = tl.maximum(first, length + tl.min(depth_m, 0) - window + 1)
    # No row number is below its position, so `first` bounds the new rows as well; those always begin at `length`.
    first = tl.minimum(first, length) // block_n * block_n

    part = tl.cdiv(tl.cdiv(end - first, splits), block_n) * block_n
    begin = first + split * part
    stop = tl.minimum(begin + part, end)

    q_at = query + token[:, None] * query_stride + head[:, None] * head_dim + dim[None, :]
    q = tl.load(q_at, mask=real[:, None] & inside[None, :], other=0.0)
    highest = tl.full([block_m], LOWEST, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    mixed = tl.zeros([block_m, block_d], tl.float32)
    head_at = kv_head.to(tl.int64) * head_stride

    for row0 in range(begin, stop, block_n):
        row = row0 + tl.arange(0, block_n)
        there = row < stop
        block = tl.load(block_table + sequence.to(tl.int64) * width + row // block_size, mask=there, other=0)
        at = head_at + (block.to(tl.int64) * block_size + row % block_size) * head_dim
        k = tl.load(keys + at[None, :] + dim[:, None], mask=there[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(q.to(product), k.to(product), input_precision="ieee") * scale

        offset = row - length
        fresh = there & (offset >= 0)
        visible = (there & (offset < 0) & (row >= oldest))[None, :] & real[:, None]
        if row0 + block_n > length:
            # The rows of one step touch two words at most.
            word_number = tl.maximum(row0 - length, 0) // WORD
            word_at = words + mask_row * word_count + word_number
            low = tl.load(word_at, mask=real, other=0)
            high = tl.load(word_at + 1, mask=real & (word_number + 1 < word_count), other=0)
            word = tl.where((offset // WORD == word_number)[None, :], low[:, None], high[:, None])
            bit = tl.where(fresh, offset % WORD, 0).to(tl.int64)
            visible = visible | (fresh[None, :] & (((word >> bit[None, :]) & 1) != 0))
        if windowed:
            depth_at = depths + sequence * depth_stride + offset
            depth = tl.where(fresh, tl.load(depth_at, mask=fresh & (offset < new), other=0).to(tl.int32), offset)
            visible = visible & (depth[None, :] > depth_m[:, None] - window)

        scores = tl.where(visible, scores, LOWEST)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weight = tl.where(visible, tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(values + at[:, None] + dim[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        rounded = weight.to(v.dtype).to(product)
        mixed = mixed * shrink[:, None] + tl.dot(rounded, v.to(product), input_precision="ieee")
        highest = higher

    line = token * (kv_heads * group) + head
    if splits == 1:
        result = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
        out_at = out + line[:, None] * head_dim + dim[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])
    else:
        part_at = line * splits + split
        tl.store(part_max + part_at, highest, mask=real)
        tl.store(part_sum + part_at, total, mask=real)
        wanted = (real & (total > 0.0))[:, None] & inside[None, :]
        tl.store(part_out + part_at[:, None] * head_dim + dim[None, :], mixed, mask=wanted)


@triton.jit
def combine_splits(
    part_max,
    part_sum,
    part_out,
    out,
    head_dim: tl.constexpr,
    splits: tl.constexpr,
    block_s: tl.constexpr,
    block_d: tl.constexpr,
):
    """One query head's parts into its result. Grid: tokens * heads. A part that saw nothing has sum 0 and is not read;
    a query that saw nothing gets zeros."""
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, block_s)
    dim = tl.arange(0, block_d)
    at = line * splits + split
    highest = tl.load(part_max + at, mask=split < splits, other=LOWEST)
    total = tl.load(part_sum + at, mask=split < splits, other=0.0)
    weight = tl.where(total > 0.0, tl.exp2(highest - tl.max(highest, 0)), 0.0)
    wanted = (total > 0.0)[:, None] & (dim < head_dim)[None, :]
    parts = tl.load(part_out + at[:, None] * head_dim + dim[None, :], mask=wanted, other=0.0)
    whole = tl.sum(total * weight, 0)
    result = tl.sum(parts * weight[:, None], 0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(out + line * head_dim + dim, result.to(out.dtype.element_ty), mask=dim < head_dim)


@triton.jit
def move_rows(
    storage,
    source,
    target,
    count,
    plane_stride,
    head_dim: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
):
    """One request's rows of one plane (a layer's K or V of one head): all are read before the first is written.

    Grid: (planes, batch). source and target int64 `[batch, count]`; storage `[planes, slots, head_dim]`.
    """
    which = tl.arange(0, block_r)
    dim = tl.arange(0, block_d)[None, :]
    request = tl.program_id(1).to(tl.int64) * count
    plane = storage + tl.program_id(0).to(tl.int64) * plane_stride
    from_slot = tl.load(source + request + which, mask=which < count, other=0)[:, None]
    to_slot = tl.load(target + request + which, mask=which < count, other=0)[:, None]
    inside = (which < count)[:, None] & (dim < head_dim)
    rows = tl.load(plane + from_slot * head_dim + dim, mask=inside, other=0.0)
    tl.debug_barrier()
    tl.store(plane + to_slot * head_dim + dim, rows, mask=inside)
