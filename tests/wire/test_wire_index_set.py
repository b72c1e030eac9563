from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchline.wire.index_set import IndexSet


@given(st.lists(st.integers(0, 40), unique=True), st.integers(0, 50))
def test_it_is_a_set_with_a_lowest_missing_index(indices: list[int], end: int) -> None:
    held, model = IndexSet(), set()
    for index in indices:
        held.add(index)
        model.add(index)
        assert held.next == min(set(range(42)) - model)
        assert held.end == max(model) + 1
        assert len(held) == len(model)
    assert [index for index in range(50) if index in held] == sorted(model)
    assert list(held.missing(end)) == [index for index in range(end) if index not in model]


def test_an_index_comes_once() -> None:
    held = IndexSet()
    assert (held.next, held.end, len(held)) == (0, 0, 0)
    held.add(0)
    with pytest.raises(AssertionError):
        held.add(0)
