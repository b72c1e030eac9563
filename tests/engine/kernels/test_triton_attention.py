"""The attention kernel against float64, through the same problems as the PyTorch path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_helpers import Problem, Shape, check, check_narrow_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from branchline.engine import attention
from branchline.engine.cache import BlockTables, PagedKvCache
from branchline.engine.models.protocol import KvGeometry
from branchline.engine.triton_attention import MAX_SPLITS, Tiling
from branchline.engine.visibility import Visibility

Cut = Callable[[int, int, int], None]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.builds(
        Shape,
        bases=st.lists(st.sampled_from([0, 1, 3, 4, 15, 16, 17, 40]), min_size=1, max_size=3).map(tuple),
        nodes=st.sampled_from([1, 2, 6, 17]),
        tree=st.sampled_from(["random", "chain", "star"]),
        kv_heads=st.integers(1, 2),
        group=st.sampled_from([1, 3, 4, 8]),
        head_dim=st.sampled_from([16, 64]),
        block_size=st.sampled_from([1, 4, 16]),
        spare_blocks=st.integers(0, 3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        window=st.sampled_from([None, 1, 3, 20]),
        late_start=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    ),
    splits=st.sampled_from([1, 2, 3, 8]),
    rows=st.sampled_from([16, 64]),
)
def test_queries_attend_to_their_context_and_ancestors(
    device: torch.device, cut: Cut, shape: Shape, splits: int, rows: int
) -> None:
    cut(16, rows, splits)
    check(shape, device)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_sizes(device: torch.device, cut: Cut, head_dim: int, dtype: torch.dtype) -> None:
    cut(16, 32, 2)
    check(Shape(bases=(37, 5), nodes=4, group=3, head_dim=head_dim, dtype=dtype), device)


@pytest.mark.parametrize("tree", ["random", "chain"])
@pytest.mark.parametrize("nodes", [64, 65, 130])
def test_trees_of_several_mask_words(device: torch.device, cut: Cut, tree: str, nodes: int) -> None:
    cut(64, 64, 2)
    check(Shape(bases=(29,), nodes=nodes, tree=tree, kv_heads=1), device)


@pytest.mark.parametrize("window", [None, 2, 9])
def test_a_drafting_level_sees_its_ancestors_in_the_cache(device: torch.device, cut: Cut, window: int | None) -> None:
    cut(16, 16, 2)
    check(Shape(bases=(7, 0), nodes=12, level=5, late_start=True, window=window), device)


@pytest.mark.parametrize("window", [None, 50])
def test_a_chunk_of_a_prompt(device: torch.device, cut: Cut, window: int | None) -> None:
    cut(64, 64, 1)
    check(Shape(bases=(70,), nodes=100, tree="chain", kv_heads=1, block_size=16, window=window), device)


def test_the_result_does_not_depend_on_the_cut(device: torch.device, cut: Cut) -> None:
    results = []
    for splits, rows in [(1, 16), (5, 16), (64, 16), (2, 64)]:
        cut(16, rows, splits)
        problem = Problem(Shape(bases=(90, 3), nodes=5), device)
        results.append(problem.attention().attend(0, problem.query, problem.key, problem.value))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=1e-6)


def test_heads_may_be_parts_of_a_merged_projection(device: torch.device, cut: Cut) -> None:
    cut(16, 16, 2)
    problem = Problem(Shape(bases=(9,), nodes=3), device)
    merged = torch.cat([problem.query, problem.key, problem.value], 1)
    expected = problem.answer(problem.storage_after(0), layer=0)
    attended = problem.attention().attend(0, merged[:, :4], merged[:, 4:6], merged[:, 6:])
    torch.testing.assert_close(attended.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_pass_serves_all_layers_whatever_their_windows(device: torch.device, cut: Cut) -> None:
    cut(16, 16, 2)
    problem = Problem(Shape(bases=(9,), nodes=3, window=4), device)
    passes = problem.attention()
    passes.attend(0, problem.query, problem.key, problem.value)
    expected = problem.answer(problem.storage_after(1), layer=1)
    attended = passes.attend(1, problem.query, problem.key, problem.value, window=4)
    torch.testing.assert_close(attended.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("splits", [1, 4])
def test_padding_sees_nothing_and_stays_finite(device: torch.device, cut: Cut, splits: int) -> None:
    cut(16, 16, splits)
    cache = PagedKvCache(KvGeometry(1, 1, 16, torch.float32), 1, 4, device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool, device=device)
    passes = attention.PagedAttention.over(
        cache, BlockTables(zero[None]), zero, zero, nothing, torch.arange(2, device=device)[None], nothing[:, 0]
    )
    attended = passes.attend(0, *torch.ones(3, 2, 1, 16, device=device))
    assert torch.equal(attended, torch.zeros(2, 1, 16, device=device))
    assert not cache.storage[:, :, :, 1:].any(), "only the null block may be written"


@pytest.mark.parametrize(("batch", "capacity"), [(1, 16), (1, 100_000), (64, 100_000)])
def test_the_tiling_follows_from_static_shapes(device: torch.device, batch: int, capacity: int) -> None:
    base = torch.zeros(batch, dtype=torch.int64, device=device)
    triangle = torch.ones(1, 33, 33, dtype=torch.bool, device=device).tril()
    visibility = Visibility.of(base, base, triangle, torch.arange(33, device=device)[None], None)
    cache = PagedKvCache(KvGeometry(1, 8, 128, torch.bfloat16), 1, 16, device)
    tiling = Tiling.of(visibility, cache, 4, capacity)
    assert 1 <= tiling.splits <= min(MAX_SPLITS, -(-capacity // 128))
    assert (tiling.queries, tiling.rows) == (64, 64)


def test_rows_beyond_the_block_table_do_not_exist(device: torch.device, cut: Cut) -> None:
    cut(16, 16, 2)
    check_narrow_table(device)
