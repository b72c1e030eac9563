from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from branchline.engine.blocks import NULL_BLOCK, BlockPool, OutOfBlocksError, blocks_for


class PoolMachine(RuleBasedStateMachine):
    """Random allocations and releases against a plain set."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.taken: set[int] = set()

    @rule(target=held, count=st.integers(0, 6))
    def allocate(self, count: int) -> list[int]:
        if count > 12 - len(self.taken):
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            return []
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert self.taken.isdisjoint(blocks)
        assert NULL_BLOCK not in blocks
        self.taken.update(blocks)
        return blocks

    @rule(blocks=consumes(held))
    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        self.taken.difference_update(blocks)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity()
        assert self.pool.used == len(self.taken)
        assert self.pool.free == 12 - len(self.taken)


TestPool = PoolMachine.TestCase


def test_a_block_can_not_be_freed_twice() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(KeyError):
        pool.release(blocks)


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(tokens, 16) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_blocks_come_in_ascending_order_whatever_was_freed_before() -> None:
    """So that a sequence's rows mostly lie side by side in memory."""
    pool = BlockPool(12)
    held = [pool.allocate(3) for _ in range(4)]
    for index in (2, 0, 3):
        pool.release(held[index][::-1])
    assert pool.allocate(7) == [1, 2, 3, 7, 8, 9, 10]
