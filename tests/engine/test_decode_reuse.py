"""The decode worker's blocks in any order of events: what is found is what the tokens say, and nobody writes to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from engine_helpers import shapes, tiny_caches
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from branchline.core import Request
from branchline.engine.allocation import Allocation
from branchline.engine.allocations import Allocations
from branchline.engine.blocks import BlockPool, OutOfBlocksError
from branchline.engine.prefix_cache import PrefixCache

SIZE, BLOCKS, SLOTS, LONGEST = 2, 26, 5, 20
#: Two tokens, so that contexts begin alike now and then.
CONTEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple)
PICK = st.integers(0, 9)
GARBAGE = (-1,)

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Group:
    context: Tokens
    samples: list[Allocation]
    imported: bool = False
    drafts: bool = False
    texts: dict[int, Tokens] = field(default_factory=dict)


class DecodeMachine(RuleBasedStateMachine):
    """`target` and `draft` are what a device would have in each slot: all tokens up to its own that a row was computed
    from, or garbage."""

    def __init__(self) -> None:
        super().__init__()
        self.caches = tiny_caches(SIZE)
        self.pool = self.caches.pool = BlockPool(BLOCKS)
        self.prefix = PrefixCache(shapes(), self.pool, SIZE, drafts=False)
        self.allocations = Allocations(self.caches, self.prefix, SLOTS, 0, torch.device("cpu"))
        self.groups: list[Group] = []
        self.target: dict[int, Tokens] = {}
        self.draft: dict[int, Tokens] = {}
        self.seen: set[Tokens] = set()

    @rule(context=CONTEXTS, samples=st.sampled_from([1, 1, 1, 2, 3]), keeps=st.sampled_from([True, True, True, False]))
    def reserve(self, context: Tokens, samples: int, keeps: bool) -> None:
        keys = self.prefix.keys(context) if keeps else None
        known = self.pool.find(keys or ())
        free, fits = self.pool.free, self.allocations.can_allocate(len(context), samples, keys=keys)
        try:
            group = self.allocations.allocate(len(context), LONGEST, samples, len(self.seen), 0, keys)
        except OutOfBlocksError:
            assert not fits
            assert self.pool.free == free
            return
        first = group[0]
        assert first.held == SIZE * min(len(known), (len(context) - 1) // SIZE)
        for position in range(first.held):
            prefix, slot = context[: position + 1], self._slot(first, position)
            assert self.target[slot] == prefix
            assert position == 0 or self.draft[slot] == prefix
        for one in group:
            assert one.blocks[: first.held // SIZE] == first.blocks[: first.held // SIZE]
            assert self.allocations.block_tables[one.slot, : len(one.blocks)].tolist() == one.blocks
        self.groups.append(Group(context, group))
        self.seen.add(context)

    @rule(pick=PICK, tokens=TOKENS, samples=st.sampled_from([1, 1, 2]))
    def next_turn(self, pick: int, tokens: Tokens, samples: int) -> None:
        """A context that goes on from an earlier text, all the way to its first token."""
        texts = sorted(text for text in self.seen if len(text) < LONGEST - 6)
        if texts:
            self.reserve((*texts[pick * len(texts) // 10], *tokens), samples, keeps=True)
            self.receive(len(self.groups), drafts=True)
            for number in range(samples):
                self.start(len(self.groups) + number, tokens[0], drafts=True)

    @rule(pick=PICK, drafts=st.sampled_from([True, True, False]))
    def receive(self, pick: int, drafts: bool) -> None:
        waiting = [one for one in self.groups if not one.imported and not one.samples[0].released]
        if not waiting:
            return
        group = waiting[pick % len(waiting)]
        first, length = group.samples[0], len(group.context)
        group.imported, group.drafts = True, drafts
        for position in range(first.held, length):
            prefix = group.context[: position + 1]
            self._write(group, first, position, prefix, prefix if drafts and position > 0 else GARBAGE)
        for other in [one for one in group.samples[1:] if not one.released]:
            for position in range(length - length % SIZE, length):
                source, slot = self._slot(first, position), self._slot(other, position)
                self._write(group, other, position, self.target[source], self.draft[source])
                assert slot != source
        self.allocations.share_context(group.samples, drafts)

    @rule(pick=PICK, first_token=st.integers(0, 1), drafts=st.sampled_from([True, True, False]))
    def start(self, pick: int, first_token: int, drafts: bool) -> None:
        idle = [
            (group, one)
            for group in self.groups
            for one in group.samples
            if group.imported and not one.running and not one.released
        ]
        if not idle:
            return
        group, one = idle[pick % len(idle)]
        drafts = drafts and group.drafts
        one.start(Request("r", group.context, 99), first_token, 4, 0, drafts, None)
        text = group.texts[one.slot] = (*group.context, first_token)
        if drafts:
            self._write(group, one, one.length, GARBAGE, text)

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=3), drafts=st.sampled_from([True] * 9 + [False]))
    def step(self, tokens: list[Tokens], drafts: bool) -> None:
        """Scratch rows over all the headroom first, then an accepted path in front."""
        running = [(group, one) for group in self.groups for one in group.samples if one.running]
        for group, one in running:
            if one.length >= LONGEST:
                self._end(group, one)
        self.allocations.grow([one for _, one in running if one.running])
        for index, (group, one) in enumerate(running):
            if one.released:
                one.leave()
                continue
            for position in range(one.length, one.length + self.caches.headroom):
                root = position == one.length  # its draft row is there already
                self._write(group, one, position, GARBAGE, None if root else GARBAGE)
            emitted = tokens[index % len(tokens)]
            text = group.texts[one.slot] = group.texts[one.slot] + emitted
            for position in range(one.length, one.length + len(emitted)):
                self._write(group, one, position, text[: position + 1], None)
                if drafts:
                    self._write(group, one, position + 1, GARBAGE, text[: position + 2])
            one.advance(emitted, drafts)
            self.seen.add(text)
        self._forget()

    @rule(pick=PICK)
    def end(self, pick: int) -> None:
        live = [(group, one) for group in self.groups for one in group.samples if not one.released]
        if live:
            self._end(*live[pick % len(live)])
            self._forget()

    @rule()
    def evict(self) -> None:
        self.pool.forget_free()

    @invariant()
    def every_block_is_counted(self) -> None:
        self.allocations.check_integrity()
        for one in self.allocations.live:
            assert one.complete <= one.length or not one.running
            assert len(set(one.blocks)) == len(one.blocks)
            assert self.allocations.block_tables[one.slot, : len(one.blocks)].tolist() == one.blocks

    @invariant()
    def what_is_known_is_complete_and_can_be_reached(self) -> None:
        found = set()
        for text in self.seen:
            for index, block in enumerate(self.pool.find(self.prefix.keys(text))):
                found.add(block)
                for position in range(index * SIZE, (index + 1) * SIZE):
                    slot = block * SIZE + position % SIZE
                    assert self.target[slot] == text[: position + 1]
                    assert position == 0 or self.draft[slot] == text[: position + 1]
        assert len(found) == self.pool.cached

    def teardown(self) -> None:
        for group in self.groups:
            for one in group.samples:
                self._end(group, one)
        assert self.pool.used == 0
        assert self.pool.free == BLOCKS

    def _end(self, group: Group, one: Allocation) -> None:
        """As the worker does it: until the context is there, sample 0 takes the others along."""
        for sample in group.samples if one is group.samples[0] and not group.imported else [one]:
            if sample.running:
                sample.leave()
            self.allocations.release(sample)

    def _forget(self) -> None:
        self.groups = [group for group in self.groups if any(not one.released for one in group.samples)]

    def _slot(self, one: Allocation, position: int) -> int:
        return one.blocks[position // SIZE] * SIZE + position % SIZE

    def _write(self, group: Group, one: Allocation, position: int, target: Tokens | None, draft: Tokens | None) -> None:
        block = one.blocks[position // SIZE]
        holders = [other for other in self.allocations.live if block in other.blocks]
        assert all(other in group.samples for other in holders), "another sequence reads there"
        assert len(holders) == 1 or position < len(group.context) // SIZE * SIZE, "another sample reads there"
        assert block not in self.pool._keys, "what is written there is known by a key"
        for rows, content in ((self.target, target), (self.draft, draft)):
            if content is not None:
                rows[self._slot(one, position)] = content


TestDecodeReuse = DecodeMachine.TestCase
TestDecodeReuse.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
