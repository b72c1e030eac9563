from __future__ import annotations

import pytest
import torch
from attention_helpers import Problem, Shape, check, check_narrow_table
from hypothesis import given, settings
from hypothesis import strategies as st

from branchline.engine.attention import PagedAttention
from branchline.engine.cache import BlockTables, PagedKvCache, slots_of
from branchline.engine.models.protocol import KvGeometry
from branchline.engine.torch_attention import GROUP, TorchAttention
from branchline.engine.visibility import MASKED, Visibility

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=100)
@given(
    st.builds(
        Shape,
        bases=st.lists(st.integers(0, 20), min_size=1, max_size=10).map(tuple),
        nodes=st.sampled_from([1, 2, 6, 17, 65, 70]),
        tree=st.sampled_from(["random", "chain", "star"]),
        kv_heads=st.integers(1, 3),
        group=st.sampled_from([1, 3, 4]),
        head_dim=st.sampled_from([8, 80]),
        block_size=st.sampled_from([1, 4, 16]),
        spare_blocks=st.integers(0, 3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        window=st.sampled_from([None, 1, 3, 100]),
        late_start=st.booleans(),
        own_widths=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
)
def test_queries_attend_to_their_context_and_ancestors(shape: Shape) -> None:
    check(shape, CPU)


@pytest.mark.parametrize("window", [None, 2, 9])
def test_a_drafting_level_sees_its_ancestors_in_the_cache(window: int | None) -> None:
    check(Shape(bases=(7, 0), nodes=12, level=5, late_start=True, window=window), CPU)


@pytest.mark.parametrize("window", [None, 50])
def test_a_chunk_of_a_prompt(window: int | None) -> None:
    check(Shape(bases=(33,), nodes=130, tree="chain", block_size=16, window=window), CPU)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("base", [0, 33])
def test_rows_that_no_query_of_a_tile_sees_are_left_out(base: int, window: int | None) -> None:
    """A chunk is a line: what is said of it changes nothing but the work, tile by tile."""
    problem = Problem(Shape(bases=(base,), nodes=200, tree="chain", block_size=16, window=window), CPU)
    given = (problem.query, problem.key, problem.value)
    whole = problem.attention().attend(1, *given, window=window)
    attention = problem.attention(line_from=base)
    torch.testing.assert_close(attention.attend(1, *given, window=window), whole)
    assert isinstance(attention, TorchAttention)
    problem.cache.storage[1, :, :, slots_of(problem.table, torch.tensor([[base + 130]]), 16)] = torch.inf
    attention._places = attention._places[:0]  # the cache is as it was, but for a row that the first tiles don't see
    nothing = given[1][:0]
    again = attention.attend(1, problem.query, nothing, nothing, window=window)
    assert torch.isfinite(again[:128]).all()
    assert not torch.isfinite(again[140:]).all()


def test_a_batch_is_read_as_far_as_each_group_of_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Shape(bases=(90, 70, 50, 40, 30, 20, 20, 20, 9, 2), nodes=3, own_widths=True), CPU)
    read = []
    gather = problem.cache.gather
    monkeypatch.setattr(problem.cache, "gather", lambda *given: read.append(len(given[1])) or gather(*given))
    problem.attention().attend(0, problem.query, problem.key, problem.value)
    assert read == [GROUP * problem.widths[0], 2 * problem.widths[8]]


def test_rows_beyond_the_block_table_do_not_exist() -> None:
    check_narrow_table(CPU)


def test_rows_that_are_not_kept_go_to_the_null_block() -> None:
    problem = Problem(Shape(bases=(3, 6), nodes=3), CPU)
    before, expected = problem.cache.storage.clone(), problem.storage_after(0)
    problem.attention(keep=[True, False]).attend(0, problem.query, problem.key, problem.value)
    changed = (problem.cache.storage != before).any(4).any(2).any(1).any(0).nonzero()[:, 0].tolist()
    assert changed == sorted([0, *(problem.slot(0, 3 + node) for node in range(3))])
    first = [problem.slot(0, 3 + node) for node in range(3)]
    assert torch.equal(problem.cache.storage[:, :, :, first], expected[:, :, :, first])


def test_layers_of_different_windows_share_a_pass() -> None:
    problem = Problem(Shape(bases=(9,), nodes=3, window=4), CPU)
    attention = problem.attention()
    everything = attention.attend(0, problem.query, problem.key, problem.value)
    expected = problem.answer(problem.storage_after(1), layer=1)
    attended = attention.attend(1, problem.query, problem.key, problem.value, window=4)
    torch.testing.assert_close(attended.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(attention.attend(0, problem.query, problem.key, problem.value), everything)


def test_without_depths_the_new_rows_are_a_line() -> None:
    problem = Problem(Shape(bases=(9,), nodes=5, tree="chain", window=3), CPU)
    triangle = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    attention = PagedAttention.over(
        problem.cache,
        BlockTables(problem.table),
        torch.tensor([9]),
        torch.tensor([0]),
        triangle,
        torch.arange(5)[None],
        torch.ones(1, 5, dtype=torch.bool),
    )
    expected = problem.answer(problem.storage_after(0), layer=0)
    attended = attention.attend(0, problem.query, problem.key, problem.value, window=3)
    torch.testing.assert_close(attended.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_stays_finite() -> None:
    nothing, zero = torch.zeros(1, 1, 1, dtype=torch.bool), torch.tensor([0])
    bias = Visibility.of(zero, zero, nothing, zero[None], None).bias(4, None, torch.float32)
    assert (bias == torch.tensor(MASKED)).all()
    cache = PagedKvCache(KvGeometry(1, 1, 8, torch.float32), 1, 4, CPU)
    attention = PagedAttention.over(
        cache, BlockTables(torch.tensor([[0]])), zero, zero, nothing, zero[None], torch.tensor([[False]])
    )
    assert attention.attend(0, *torch.ones(3, 1, 1, 8)).isfinite().all()


@pytest.mark.parametrize("rows", [4, 9])
def test_the_bias_of_a_chunk_is_a_triangle(rows: int) -> None:
    triangle = torch.ones(1, 2, 2, dtype=torch.bool).tril()
    visibility = Visibility.of(torch.tensor([2]), torch.tensor([1]), triangle, torch.tensor([[0, 1]]), None)
    visible = (visibility.bias(rows, None, torch.float32) == 0).int().tolist()[0]
    assert visible == [[0, 1, 1, 0, *[0] * (rows - 4)], [0, 1, 1, 1, *[0] * (rows - 4)]]
