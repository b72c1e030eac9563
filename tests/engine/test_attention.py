from __future__ import annotations

import pytest
import torch
from engine_helpers import random_parents
from hypothesis import given, settings
from hypothesis import strategies as st

from branchline.engine.attention import FUSED_FROM_QUERIES, MASKED, PagedAttention, attention_bias
from branchline.engine.cache import PagedKvCache, slots_of
from branchline.engine.models.protocol import KvGeometry
from branchline.engine.tree import topology_tensors

BLOCK = 4


def dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: list[int]) -> torch.Tensor:
    """One query `[heads, head_dim]` over the visible rows, in float64."""
    group = query.shape[0] // keys.shape[1]
    keys = keys[visible].double().repeat_interleave(group, 1)
    values = values[visible].double().repeat_interleave(group, 1)
    weights = torch.einsum("hd,rhd->hr", query.double(), keys) * query.shape[1] ** -0.5
    return torch.einsum("hr,rhd->hd", weights.softmax(-1), values)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    drafted=st.sampled_from([0, 1, 5, FUSED_FROM_QUERIES]),
    group=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_trees_attend_to_their_context_and_ancestors(
    seed: int, batch: int, drafted: int, group: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kv_heads, head_dim, nodes = 2, 8, drafted + 1
    lengths = torch.randint(1, 20, (batch,), generator=generator)
    starts = (torch.rand(batch, generator=generator) * lengths).long()
    width = (int(lengths.max()) + nodes) // BLOCK + 1
    table = (torch.randperm(batch * width, generator=generator) + 1).view(batch, width)
    cache = PagedKvCache(KvGeometry(2, kv_heads, head_dim, dtype), batch * width, BLOCK, torch.device("cpu"))
    cache.storage.copy_(torch.randn(cache.storage.shape, generator=generator))
    parents = torch.stack([random_parents(generator, drafted) for _ in range(batch)])
    _, ancestors = topology_tensors(parents, drafted)

    query = torch.randn(batch * nodes, kv_heads * group, head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, batch * nodes, kv_heads, head_dim, generator=generator).to(dtype)
    attention = PagedAttention.over(
        cache, table, lengths, starts, ancestors, torch.arange(nodes)[None], torch.ones(1, nodes, dtype=torch.bool)
    )
    attended = attention.attend(1, query, key, value).view(batch, nodes, kv_heads * group, head_dim)

    tolerance = 1e-5 if dtype is torch.float32 else 4e-2
    for row in range(batch):
        length = int(lengths[row])
        slots = slots_of(table[row : row + 1], torch.arange(length + nodes)[None], BLOCK)[0]
        keys, values = cache.storage[1][:, :, slots].transpose(1, 2)
        assert torch.equal(keys[length:], key.view(batch, nodes, kv_heads, head_dim)[row])
        for node in range(nodes):
            visible = [*range(int(starts[row]), length)]
            visible += [length + other for other in ancestors[row, node].nonzero()[:, 0].tolist()]
            expected = dense(query.view(batch, nodes, -1, head_dim)[row, node], keys, values, visible)
            torch.testing.assert_close(attended[row, node].double(), expected, atol=tolerance, rtol=tolerance)


def test_rows_that_are_not_kept_go_to_the_null_block() -> None:
    cache = PagedKvCache(KvGeometry(1, 1, 2, torch.float32), 2, BLOCK, torch.device("cpu"))
    attention = PagedAttention.over(
        cache,
        torch.tensor([[1], [2]]),
        torch.tensor([1, 1]),
        torch.tensor([0, 0]),
        torch.ones(1, 1, 1, dtype=torch.bool),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.tensor([[True], [False]]),
    )
    attention.attend(0, *torch.ones(3, 2, 1, 2))
    written = cache.storage.abs().sum((0, 1, 2, 4)).nonzero()[:, 0].tolist()
    assert written == [0, BLOCK + 1]


def test_a_query_that_sees_nothing_stays_finite() -> None:
    bias = attention_bias(torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 1, 1, dtype=torch.bool), 4)
    assert (bias == torch.tensor(MASKED)).all()
    assert torch.softmax(bias, -1).isfinite().all()


@pytest.mark.parametrize("rows", [4, 9])
def test_the_bias_of_a_chunk_is_a_triangle(rows: int) -> None:
    bias = attention_bias(torch.tensor([2]), torch.tensor([1]), torch.ones(1, 2, 2, dtype=torch.bool).tril(), rows)
    visible = (bias == 0).int().tolist()[0]
    assert visible == [[0, 1, 1, 0, *[0] * (rows - 4)], [0, 1, 1, 1, *[0] * (rows - 4)]]
