"""The rewind kernel against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchline.engine.triton_rewind import move

LAYERS, KV_HEADS, SLOTS = 2, 2, 96


def moved(storage: torch.Tensor, source: list[list[int]], target: list[list[int]]) -> torch.Tensor:
    result = storage.clone()
    for sources, targets in zip(source, target, strict=True):
        for old, new in zip(sources, targets, strict=True):
            result[:, :, :, new] = storage[:, :, :, old]
    return result


def check(device: torch.device, head_dim: int, dtype: torch.dtype, source: list[list[int]], target: list[list[int]]):
    storage = torch.randn(LAYERS, 2, KV_HEADS, SLOTS, head_dim).to(device, dtype)
    expected = moved(storage, source, target)
    move(storage, torch.tensor(source, device=device), torch.tensor(target, device=device))
    assert torch.equal(storage, expected)


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    count=st.integers(1, 9),
    head_dim=st.sampled_from([8, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_each_request_reads_its_rows_before_it_writes(
    device: torch.device, data: st.DataObject, batch: int, count: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Each request has a third of the slots; within it, sources and targets overlap as they like."""
    each = SLOTS // 3
    source, target = [], []
    for request in range(batch):
        own = range(request * each, (request + 1) * each)
        source.append(data.draw(st.lists(st.sampled_from(own), min_size=count, max_size=count)))
        target.append(data.draw(st.permutations(own))[:count])
    check(device, head_dim, dtype, source, target)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_range_moves_by_one_row_across_blocks(device: torch.device, shift: int) -> None:
    source = list(range(10, 60))
    check(device, 64, torch.float32, [source], [[slot + shift for slot in source]])


def test_a_permutation_within_the_rows(device: torch.device) -> None:
    check(device, 128, torch.bfloat16, [[3, 2, 1, 0], [50, 51, 52, 53]], [[0, 1, 2, 3], [51, 52, 53, 50]])


def test_nobody_else_is_touched_by_rows_sent_to_the_null_block(device: torch.device) -> None:
    storage = torch.randn(LAYERS, 2, KV_HEADS, SLOTS, 16, device=device)
    before = storage.clone()
    move(storage, torch.tensor([[20, 30], [40, 50]], device=device), torch.tensor([[18, 0], [0, 0]], device=device))
    assert torch.equal(storage[:, :, :, 18], before[:, :, :, 20])
    before[:, :, :, [0, 18]] = storage[:, :, :, [0, 18]]
    assert torch.equal(storage, before)
