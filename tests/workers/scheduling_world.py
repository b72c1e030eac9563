"""A decode worker's engine side under test: the real loop, runner and model, and a driver that plays everybody else.

The cache is small, so sequences get in each other's way. The driver keeps its own books, from what it asked for and
what it was told, and checks each event against them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config

from branchline.config import EngineConfig, ModelConfig
from branchline.core import DraftTree, FinishReason, KvPart, KvSpan, Request, SamplingParams
from branchline.engine.decode import DecodeRunner
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import KvGeometry, Models
from branchline.engine.tree import TreeTopology
from branchline.engine.tree_spec import parse_tree
from decode_worker.admission import Reservation
from decode_worker.engine_loop import DecodeLoop, EngineEvent, Granted, Preemption, StepFailure, Stepped

#: Tokens that a sequence may reach, and the batch's slots.
MAX_LEN, SLOTS, BLOCK = 48, 4, 4
TREE = parse_tree("[[0],[1],[0,0]]")
FIRST_TOKEN = 5


def load(directory: Path) -> Models:
    """A tiny model with large KV: few tokens fill the smallest cache that can be configured."""
    save_tiny_model(directory / "model", tiny_config(head_dim=64))
    head = save_head(directory / "head", head_config(), head_tensors())
    config = ModelConfig(
        model=str(directory / "model"), draft=str(head), dtype="float32", provider="reference", device="cpu"
    )
    return load_models(config, EngineConfig(threads=1))


def new_loop(models: Models, pipelined: bool, tree: TreeTopology = TREE) -> DecodeLoop:
    """`pipelined`: as on CUDA, where the host hears of an iteration when the next one is under way."""
    engine = EngineConfig(kv_cache_mib=1, block_size=BLOCK, max_batch=SLOTS, max_model_len=MAX_LEN)
    return DecodeLoop(models, tree, DecodeRunner(models, engine, tree, pipelined=pipelined))


@dataclass(eq=False)
class Sequence:
    """One sample of a request, over all its leases."""

    prompt_length: int
    max_tokens: int
    sample: int
    lease_id: str = ""
    emitted: int = 0
    started: bool = False
    #: Nothing more is expected of it.
    over: bool = False

    @property
    def context_length(self) -> int:
        return self.prompt_length + self.emitted

    @property
    def expected(self) -> int:
        """Tokens in all: the request's, or as many as the context limit leaves."""
        return min(self.max_tokens, MAX_LEN - self.prompt_length)

    def request(self) -> Request:
        sampling = SamplingParams(temperature=0.8, seed=self.prompt_length, sample_index=self.sample)
        prompt, emitted = (7,) * self.prompt_length, (FIRST_TOKEN,) * self.emitted
        return Request("request", prompt, self.max_tokens, sampling, emitted)


@dataclass(eq=False)
class Group:
    """What one reservation asks for."""

    reservation: Reservation
    sequences: list[Sequence]
    granted: bool = False
    shared: bool = False
    imported: bool = False
    #: Its draft KV came as well.
    drafts: bool = False
    #: Tokens whose KV was there.
    held: int = 0

    @property
    def live(self) -> list[Sequence]:
        lease_ids = self.reservation.lease_ids
        return [one for one in self.sequences if not one.over and one.lease_id in lease_ids]


@dataclass
class World:
    """`waiting` are in the order in which they must be granted; `granted` have blocks."""

    loop: DecodeLoop
    seed: int = 0
    now: float = 0.0
    waiting: list[Group] = field(default_factory=list)
    granted: list[Group] = field(default_factory=list)
    preempted: list[tuple[Reservation, Sequence]] = field(default_factory=list)
    preemptions: int = 0
    reused: int = 0
    stepping: bool = False
    leases: int = 0
    most_blocks: int = 0
    ending: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.loop.listener = self._on_event
        self._random = random.Random(self.seed)
        # The host may not have heard of an iteration's tokens yet.
        self.most_blocks = self.loop.runner.caches.blocks_for(MAX_LEN + TREE.depth + 1)

    def reserve(self, reservation: Reservation, sequences: list[Sequence], wait: bool = True) -> Group:
        """Raises what the loop raises; then nothing has changed."""
        group = Group(reservation, sequences)
        for sequence, lease_id in zip(sequences, reservation.lease_ids, strict=True):
            sequence.lease_id, sequence.started = lease_id, False
        later = [one for one in self.waiting if one.reservation.rank > reservation.rank]
        self.waiting.insert(len(self.waiting) - len(later), group)
        try:
            self.loop.reserve(reservation, wait)
        except Exception:
            self.waiting.remove(group)
            raise
        return group

    def new_lease_ids(self, count: int) -> tuple[str, ...]:
        self.leases += count
        return tuple(f"lease {self.leases - count + number}" for number in range(count))

    def import_kv(self, group: Group, with_draft: bool) -> None:
        """All KV of a hand-off that isn't there, random bytes."""
        runner, length = self.loop.runner, group.reservation.context_length
        self._import(group.sequences[0], runner.target_kv, KvPart.TARGET, (group.held, length))
        if with_draft and runner.draft_kv is not None:
            self._import(group.sequences[0], runner.draft_kv, KvPart.DRAFT, (max(1, group.held), length + 1))
            for sequence in group.live[1:]:
                self._import(sequence, runner.draft_kv, KvPart.DRAFT, (length, length + 1))
        group.imported, group.drafts = True, with_draft

    def share(self, group: Group) -> None:
        group.shared = True  # before: whoever waits may be granted by it, and preempt
        self.loop.share([sequence.lease_id for sequence in group.live], group.drafts)

    def start(self, group: Group, sequence: Sequence, with_draft: bool) -> None:
        """As `decode_worker.sessions` does: the first token is emitted, and may be the last."""
        request = sequence.request()
        sequence.emitted += 1
        if sequence.emitted == sequence.expected:
            self.end(group, sequence)
            return
        sequence.started = True
        tree = DraftTree((4, 6), (0, 1), (-0.5, -1.0)) if with_draft else DraftTree()
        self.loop.start(sequence.lease_id, request, FIRST_TOKEN, tree, with_draft)

    def step(self) -> bool:
        self.stepping = True
        try:
            return self.loop.step()
        finally:
            self.stepping = False

    def end(self, group: Group, sequence: Sequence) -> None:
        """A sample is released; before the context is shared sample 0 takes the others along."""
        ending = group.live if sequence is group.sequences[0] and not group.shared else [sequence]
        for one in ending:
            one.over = True
        self._forget_ended()
        # One release may let somebody in who preempts the next: nobody listens for that one any more.
        self.ending = {one.lease_id for one in ending}
        for one in ending:
            self.loop.release(one.lease_id)
        self.ending.clear()

    def withdraw(self, group: Group) -> None:
        for sequence in group.live:
            sequence.over = True
        if group in self.waiting:
            self.waiting.remove(group)
        self._forget_ended()
        self.loop.withdraw(group.reservation)

    def come_back(self) -> None:
        """Whoever was preempted asks again, with its rank, for what it has by now."""
        while self.preempted:
            old, sequence = self.preempted.pop(0)
            length = sequence.context_length
            ids = self.new_lease_ids(1)
            keys = None if old.keys is None else self.loop.runner.keys(sequence.request().context)
            reservation = Reservation(ids, length, length + sequence.max_tokens, old.rank, old.priority, keys)
            self.reserve(reservation, [sequence])

    def check(self) -> None:
        """The books agree with the engine's."""
        runner = self.loop.runner
        runner.check_integrity()
        live = [sequence for group in self.granted for sequence in group.live]
        assert len(runner.live) == len(live) <= SLOTS
        assert runner.running == sum(sequence.started for sequence in live)
        held: set[int] = set()
        for group in {id(one.group): one.group for one in runner.live}.values():
            members = [one for one in group if not one.released]
            full = members[0].context_length // BLOCK
            for one in members:
                held.update(one.blocks)
                assert len(one.blocks) >= runner.caches.blocks_for(one.context_length)
                assert len(one.blocks) <= self.most_blocks
                assert one.blocks[:full] == members[0].blocks[:full]
        assert runner.pool.used == len(held)
        if self.waiting:
            self._check_head(self.waiting[0].reservation)

    def _check_head(self, head: Reservation) -> None:
        """Whoever waits first has no room, and would have none without all that it may push aside."""
        runner, samples = self.loop.runner, len(head.lease_ids)
        lesser = [one for one in runner.live if one.priority < head.priority and one.rank > head.rank]
        assert not runner.can_allocate(head.context_length, samples, keys=head.keys)
        assert not runner.can_allocate(head.context_length, samples, lesser, head.keys)

    def _import(self, sequence: Sequence, geometry: KvGeometry, part: KvPart, tokens: tuple[int, int]) -> None:
        span = KvSpan(part, (0, geometry.num_layers), (0, geometry.num_kv_heads), tokens)
        size = (tokens[1] - tokens[0]) * geometry.bytes_per_token
        # Zero exponents: no infinity and no NaN, which the model could not compute with.
        data = bytearray(self._random.randbytes(size))
        data[3::4] = bytes([0x3E]) * (size // 4)
        self.loop.import_kv(sequence.lease_id, span, bytes(data))

    def _on_event(self, event: EngineEvent) -> None:
        match event:
            case Granted(reservation, held):
                group = self.waiting.pop(0)
                assert group.reservation is reservation, "it has overtaken another"
                group.granted, group.held = True, held
                self.reused += held
                self.granted.append(group)
            case Preemption(lease_ids):
                self._on_preemption(lease_ids)
            case Stepped(progress):
                for one in progress:
                    self._on_tokens(one.lease_id, len(one.token_ids), one.finish)
            case StepFailure():
                raise AssertionError("a step failed")

    def _on_preemption(self, lease_ids: tuple[str, ...]) -> None:
        lost = [self._find(lease_id) for lease_id in lease_ids if lease_id not in self.ending]
        self.preemptions += len(lost)
        if not lost:
            return
        ranks = [group.reservation.rank for group, _ in lost]
        if self.stepping:
            assert all(one.rank <= min(ranks) for one in self.loop.runner.live), "not the last ones were preempted"
        else:
            head = self.waiting[0].reservation
            assert all(group.reservation.priority < head.priority for group, _ in lost)
            assert all(rank > head.rank for rank in ranks)
            fits = self.loop.runner.can_allocate(head.context_length, len(head.lease_ids), keys=head.keys)
            assert fits, "preempted for nothing"
        for group, _ in lost:
            assert group.shared or all(one in [sequence for _, sequence in lost] for one in group.live)
        for group, sequence in lost:
            sequence.lease_id = ""
            self.preempted.append((group.reservation, sequence))
        self._forget_ended()

    def _on_tokens(self, lease_id: str, count: int, finish: FinishReason | None) -> None:
        _, sequence = self._find(lease_id)
        assert count >= 1
        sequence.emitted += count
        assert sequence.emitted <= sequence.expected
        assert (finish is FinishReason.LENGTH) == (sequence.emitted == sequence.expected)
        sequence.over = finish is not None
        self._forget_ended()

    def _find(self, lease_id: str) -> tuple[Group, Sequence]:
        found = [(group, one) for group in self.granted for one in group.live if one.lease_id == lease_id]
        assert len(found) == 1, lease_id
        return found[0]

    def _forget_ended(self) -> None:
        self.granted = [group for group in self.granted if group.live]
