"""The writer's parts: drawing from logits, seeing loops, and attention over sequences that begin together."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import DenseAttention

from branchline.engine.models.protocol import KvGeometry
from tools.draft_head.cohort import GROWTH, Box, BoxAttention
from tools.draft_head.segments import Segment, Voice
from tools.draft_head.writer import draw, loops

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def voiced(temperature: float, min_p: float = 0.0, banned: frozenset[int] = frozenset()) -> Segment:
    return Segment((1,), 9, Voice(temperature, min_p), frozenset(), banned=banned)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 150, generator=generator)
    count, chance = 20_000, random.Random(0)
    found = draw(logits.expand(count, -1), [voiced(0.7)] * count, [chance.random() for _ in range(count)])
    expected = torch.softmax(logits[0] / 0.7, -1) * count
    observed = torch.bincount(torch.tensor(found), minlength=150)
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 230  # 149 degrees of freedom: a chance in 10,000 to be above


def test_rows_are_drawn_by_their_own_settings() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(400, 1)
    rows = [voiced(1.0, 0.4), voiced(1.0, banned=frozenset({0, 3})), voiced(0.01), voiced(1.0)] * 100
    chance = random.Random(1)
    found = draw(logits, rows, [chance.random() for _ in rows])
    assert set(found[0::4]) == {0, 1}
    assert set(found[1::4]) == {1, 2}
    assert set(found[2::4]) == {0}
    assert set(found[3::4]) == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_highest_chance_draws_a_token_that_has_one(dtype: torch.dtype) -> None:
    logits = torch.full((1, 131), -40.0, dtype=dtype)
    logits[0, 3:60] = 1.0
    assert draw(logits, [voiced(1.0, 0.5)], [1 - 2**-53]) == [59]
    assert draw(logits, [voiced(1.0, 0.5)], [0.0]) == [3]


def test_loops_are_seen_when_they_have_lasted() -> None:
    start = [random.Random(0).randrange(1000) for _ in range(32)]
    assert loops([*start, *[7] * 64])
    assert loops([*start, *list(range(16)) * 4])
    assert not loops([*start, *[7] * 48])
    assert not loops([random.Random(number).randrange(10**6) for number in range(96)])
    assert not loops([*start, *list(range(17)) * 4][:96])


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.integers(1, GROWTH + 10),
    window=st.sampled_from([None, 3, 70]),
    seed=st.integers(0, 2**32),
)
def test_boxes_attend_as_sequences_alone_do(sizes: list[int], steps: int, window: int | None, seed: int) -> None:
    """Boxes that begin together and lose sequences on the way, against one dense pass over each sequence."""
    torch.manual_seed(seed)
    kv, chance = KvGeometry(1, KV_HEADS, WIDTH, torch.float32), random.Random(seed)
    boxes = [Box.empty(size, kv, 3, torch.device("cpu")) for size in sizes]
    total = sum(sizes)
    members = [list(range(sum(sizes[:index]), sum(sizes[: index + 1]))) for index in range(len(sizes))]
    query, key, value = (
        torch.randn(total, steps, heads, WIDTH, dtype=torch.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    found: dict[int, list[torch.Tensor]] = {number: [] for number in range(total)}
    for step in range(steps):
        rows = [number for box in members for number in box]
        for box in boxes:
            box.make_room()
        attended = BoxAttention(boxes).attend(0, query[rows, step], key[rows, step], value[rows, step], window=window)
        for number, row in zip(rows, attended, strict=True):
            found[number].append(row)
        for box, inside in zip(boxes, members, strict=True):
            box.rows += 1
            if box.size > 1 and chance.random() < 0.02:
                place = chance.randrange(box.size)
                box.remove(place)
                inside[place] = inside[-1]
                inside.pop()
    for number, parts in found.items():
        length = len(parts)
        one = (query[number, :length], key[number, :length], value[number, :length])
        expected = DenseAttention().attend(0, *one, window=window)
        torch.testing.assert_close(torch.stack(parts), expected, rtol=1e-5, atol=1e-5)


def test_a_box_like_another_has_its_rows_for_all() -> None:
    torch.manual_seed(0)
    kv = KvGeometry(2, KV_HEADS, WIDTH, torch.float32)
    box = Box.empty(1, kv, 3, torch.device("cpu"))
    box.rows = 5
    for tensor in (*box.keys, *box.values, box.states):
        tensor.normal_()
    many = box.like(3)
    assert (many.size, many.rows, many.capacity) == (3, 5, box.capacity)
    for ours, theirs in zip((*many.keys, many.states), (*box.keys, box.states), strict=True):
        assert torch.equal(ours, theirs.expand(3, *theirs.shape[1:]))
        assert ours.data_ptr() != theirs.data_ptr()
