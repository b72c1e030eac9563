"""Blocks found by content: what a key promises is in the block, and every block is counted, in any order of events."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from engine_helpers import shapes
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from branchline.core import Fingerprint
from branchline.engine.blocks import BlockPool, OutOfBlocksError, blocks_for
from branchline.engine.prefix_cache import PrefixCache, block_keys, root_key

SIZE, TOTAL = 2, 9
#: Two tokens, so that contexts begin alike now and then.
CONTEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple)
PICK = st.integers(0, 9)


@dataclass
class Sequence:
    tokens: tuple[int, ...]
    keys: tuple[bytes, ...]
    blocks: list[int]
    computed: int


class PrefixMachine(RuleBasedStateMachine):
    """Sequences as the prefill engine runs them; `content` is what a device would have in its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.cache = PrefixCache(shapes(), self.pool, SIZE)
        self.live: list[Sequence] = []
        self.others: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        self.fused: dict[int, float] = {}

    @rule(tokens=CONTEXTS)
    def begin(self, tokens: tuple[int, ...]) -> None:
        keys = self.cache.keys(tokens)
        held = Counter(self._holders())
        taken = self.cache.take(keys, len(tokens))
        assert len(taken) * SIZE < len(tokens), "nothing is left to compute"
        for index, block in enumerate(taken):
            assert self.content[block] == tokens[: (index + 1) * SIZE]
            state = self.cache.fused(block)
            assert state is not None
            assert state.unique().tolist() == [self.fused[block]]
        assert len(taken) == min(self._known(keys), (len(tokens) - 1) // SIZE), "a known prefix was not taken"
        need = blocks_for(len(tokens), SIZE) - len(taken)
        if need > TOTAL - len(held.keys() | set(taken)):
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(need)
            self.pool.release(taken)
            return
        fresh = self.pool.allocate(need)
        self._overwrite(fresh)
        self.live.append(Sequence(tokens, keys, taken + fresh, len(taken) * SIZE))

    @rule(pick=PICK, count=st.integers(1, 7))
    def advance(self, pick: int, count: int) -> None:
        if not self.live:
            return
        one = self.live[pick % len(self.live)]
        before, one.computed = one.computed // SIZE, min(one.computed + count, len(one.tokens))
        for index in range(before, one.computed // SIZE):
            block, prefix = one.blocks[index], one.tokens[: (index + 1) * SIZE]
            self.content[block] = prefix
            state = float(torch.rand(()))
            (kept,) = self.cache.remember([block], [one.keys[index]], torch.full((1, 8), state))
            assert self.content[kept] == prefix
            if kept == block:
                self.fused[block] = state
            else:
                self._overwrite([block])
            one.blocks[index] = kept

    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        if self.live:
            self.pool.release(self.live.pop(pick % len(self.live)).blocks)

    @rule(count=st.integers(1, 5))
    def take_for_others(self, count: int) -> None:
        """Blocks that are never cached push cached ones out."""
        if count > self.pool.free:
            return
        blocks = self.pool.allocate(count)
        self._overwrite(blocks)
        self.others.append(blocks)

    @rule(pick=PICK)
    def release_others(self, pick: int) -> None:
        if self.others:
            self.pool.release(self.others.pop(pick % len(self.others)))

    @rule()
    def evict(self) -> None:
        self.pool.forget_free()
        held = Counter(self._holders())
        self._overwrite([block for block in range(1, TOTAL + 1) if block not in held])

    @invariant()
    def counts_are_exact(self) -> None:
        self.pool.check_integrity()
        held = Counter(self._holders())
        assert self.pool.used == len(held)
        assert self.pool.free == TOTAL - len(held)
        for block, count in held.items():
            assert self.pool.freed_by([[block]] * count) == 1, "held by more or fewer than it is"

    @invariant()
    def what_is_cached_can_be_reached(self) -> None:
        """A block's predecessor outlives it: each cached block is found by its whole chain, and is what it says."""
        found = set()
        root = root_key(shapes().fingerprint, torch.float32, SIZE)
        for tokens in set(self.content.values()):
            keys = tuple(block_keys(root, tokens, SIZE))
            chain = self.pool.find(keys)
            assert [self.content[block] for block in chain] == [tokens[: n * SIZE + SIZE] for n in range(len(chain))]
            found.update(chain)
        assert len(found) == self.pool.cached

    def _holders(self) -> list[int]:
        return [block for blocks in (*(one.blocks for one in self.live), *self.others) for block in blocks]

    def _known(self, keys: tuple[bytes, ...]) -> int:
        return len(self.pool.find(keys))

    def _overwrite(self, blocks: list[int]) -> None:
        for block in blocks:
            self.content.pop(block, None)


TestPrefixCache = PrefixMachine.TestCase


def chain(tokens: tuple[int, ...], size: int = 4, **root: object) -> list[bytes]:
    facts = {"fingerprint": Fingerprint({"weights": "a"}, "head"), "dtype": torch.float32, "block_size": size} | root
    return list(block_keys(root_key(**facts), tokens, size))  # type: ignore[arg-type]


def test_keys_follow_the_whole_context() -> None:
    tokens = tuple(range(100, 111))
    keys = chain(tokens)
    assert len(keys) == 2
    assert chain((*tokens, 5)) == [*keys, chain((*tokens, 5))[2]]
    other = chain((7, *tokens[1:]))
    assert not set(keys) & set(other), "the second block's key forgets what stood before it"


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": Fingerprint({"weights": "b"}, "head")},
        {"fingerprint": Fingerprint({"weights": "a"}, "another head")},
        {"dtype": torch.bfloat16},
        {"block_size": 5},
    ],
)
def test_keys_follow_everything_that_the_kv_depends_on(change: dict[str, object]) -> None:
    tokens = tuple(range(4))
    assert chain(tokens) == chain(tokens)
    assert not set(chain(tokens)) & set(chain(tokens, **change))


def test_the_least_recently_used_chain_goes_first_from_its_end() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(shapes(), pool, 2, drafts=False)
    chains = [cache.keys((token, 0, 0, 0)) for token in (1, 2)]
    for keys in chains:
        blocks = pool.allocate(2)
        pool.release(cache.remember(blocks, keys, None))
    pool.release(pool.take(chains[0]))  # used again
    for left in [(2, 1), (2, 0), (1, 0), (0, 0)]:
        pool.allocate(1)
        assert tuple(len(pool.find(keys)) for keys in chains) == left


def test_empty_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    pool.remember(block, b"key")
    pool.release([block])
    assert block not in pool.allocate(2)
    assert pool.find([b"key"]) == [block]
    assert pool.allocate(1) == [block]
    assert pool.find([b"key"]) == []


def test_a_cache_that_is_off_finds_and_keeps_nothing() -> None:
    pool = BlockPool(3)
    cache = PrefixCache(shapes(), pool, 2, enabled=False)
    assert cache.keys((1, 2, 3, 4)) == ()
    assert cache.take((), 4) == []
    assert pool.cached == 0


def test_another_model_has_other_blocks() -> None:
    pool, models = BlockPool(3), shapes()
    other = dataclasses.replace(models, fingerprint=Fingerprint({"weights": "others"}, models.fingerprint.draft))
    tokens = (1, 2, 3)
    assert PrefixCache(models, pool, 2).keys(tokens) != PrefixCache(other, pool, 2).keys(tokens)
