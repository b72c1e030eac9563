from __future__ import annotations

import pytest
import torch
from engine_helpers import tiny_caches
from hypothesis import given
from hypothesis import strategies as st

from branchline.core import InvalidRequestError, KvPart, KvSpan
from branchline.engine.cache import PagedKvCache, slots_of
from branchline.engine.models.protocol import KvGeometry

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=4, dtype=torch.float32)


def filled_cache(blocks: int = 6, block_size: int = 4) -> PagedKvCache:
    cache = PagedKvCache(GEOMETRY, blocks, block_size, torch.device("cpu"))
    cache.storage.copy_(torch.arange(cache.storage.numel()).view_as(cache.storage))
    return cache


def test_slots_follow_the_block_table() -> None:
    table = torch.tensor([[5, 2, 4]])
    assert slots_of(table, torch.tensor([[0, 3, 4, 11]]), 4).tolist() == [[20, 23, 8, 19]]


@given(st.data())
def test_move_reads_every_row_before_it_writes(data: st.DataObject) -> None:
    cache = filled_cache()
    count = data.draw(st.integers(1, 10))
    rows = st.lists(st.integers(0, 27), min_size=count, max_size=count)
    source, target = data.draw(rows), data.draw(st.permutations(range(28)).map(lambda order: order[:count]))
    expected = cache.storage.clone()
    for s, t in zip(source, target, strict=True):
        expected[:, :, :, t] = cache.storage[:, :, :, s]
    cache.move(torch.tensor([source]), torch.tensor([target]))
    assert torch.equal(cache.storage, expected)


def test_gather_returns_blocks_in_the_order_of_the_tables() -> None:
    cache = filled_cache()
    keys, values = cache.gather(1, torch.tensor([3, 1, 2, 5]), batch=2)
    assert keys.shape == values.shape == (2 * 2, 8, 4)
    assert torch.equal(keys[0, :4], cache.storage[1, 0, 0, 12:16])  # head 0 of the first sequence
    assert torch.equal(keys[3, 4:], cache.storage[1, 0, 1, 20:24])  # head 1 of the second
    assert torch.equal(values[2, :4], cache.storage[1, 1, 1, 12:16])


def test_written_rows_lie_in_their_slots() -> None:
    cache = filled_cache()
    expected = cache.storage.clone()
    key, value = torch.randn(2, 3, 2, 4)
    for token, slot in enumerate([5, 0, 27]):
        expected[2, 0, :, slot], expected[2, 1, :, slot] = key[token], value[token]
    cache.write(2, cache.places(torch.tensor([5, 0, 27])), key, value)
    assert torch.equal(cache.storage, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_span_survives_the_wire_between_caches_of_other_block_sizes(dtype: torch.dtype) -> None:
    ours, theirs = tiny_caches(block_size=4, dtype=dtype), tiny_caches(block_size=16, dtype=dtype)
    torch.manual_seed(0)
    ours.target.storage.copy_(torch.randn(ours.target.storage.shape))
    kv = ours.target_kv
    span = KvSpan(KvPart.TARGET, (1, kv.num_layers), (0, kv.num_kv_heads), (3, 21))
    our_blocks, their_blocks = [7, 2, 9, 4, 1, 3], [2, 1]
    data = ours.read(our_blocks, span)
    assert len(data) == torch.Size(span.shape(kv.head_dim)).numel() * dtype.itemsize
    theirs.load(their_blocks, span, data)
    assert theirs.read(their_blocks, span) == data
    one = KvSpan(KvPart.TARGET, (1, 2), (0, 1), (5, 6))
    row = torch.frombuffer(bytearray(ours.read(our_blocks, one)), dtype=dtype)
    assert torch.equal(row[: kv.head_dim], ours.target.storage[1, 0, 0, 2 * 4 + 1])  # position 5: block 2, row 1


@pytest.mark.parametrize("blocks", [list(range(1, 15)), [14, *range(1, 14)], list(range(14, 0, -1))], ids=str)
def test_a_span_is_the_same_however_its_blocks_lie(blocks: list[int]) -> None:
    """In one run, in two, and in so many that they go by index."""
    caches = tiny_caches(block_size=4)
    torch.manual_seed(0)
    caches.target.storage.copy_(torch.randn(caches.target.storage.shape))
    span = KvSpan(KvPart.TARGET, (1, 3), (0, 2), (2, 53))
    rows = torch.stack([caches.target.storage[1:3, :, :2, blocks[at // 4] * 4 + at % 4] for at in range(2, 53)], 2)
    data = caches.read(blocks, span)
    assert data == rows.contiguous().numpy().tobytes()
    other = tiny_caches(block_size=4)
    other.load(blocks, span, data)
    assert other.read(blocks, span) == data
    outside = other.target.storage.clone()
    outside[1:3, :, :2, [blocks[at // 4] * 4 + at % 4 for at in range(2, 53)]] = 0
    assert not outside.any()


@pytest.mark.parametrize(
    ("span", "data", "message"),
    [
        (KvSpan(KvPart.TARGET, (0, 99), (0, 1), (0, 1)), b"", "layers end at 99"),
        (KvSpan(KvPart.TARGET, (0, 1), (0, 9), (0, 1)), b"", "heads end at 9"),
        (KvSpan(KvPart.TARGET, (0, 1), (0, 1), (0, 33)), b"", "tokens end at 33"),
        (KvSpan(KvPart.TARGET, (0, 1), (0, 1), (0, 1)), b"123", "carries 3"),
    ],
)
def test_spans_outside_the_allocation_are_refused(span: KvSpan, data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        tiny_caches(block_size=16).load([1, 2], span, data)


def test_draft_rows_need_a_draft_head() -> None:
    caches = tiny_caches(block_size=16, draft=False)
    with pytest.raises(InvalidRequestError, match="no draft head"):
        caches.load([1], KvSpan(KvPart.DRAFT, (0, 1), (0, 1), (1, 2)), b"")
