"""The engine's side of the decode worker. Everything here runs on the engine's thread.

The asyncio side (`sessions`) names sequences by lease id and hears of them through the listener. Since commands run
in the order of submission, a release that is submitted after the last frame frees the blocks after that frame
has settled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from branchline.core import DraftTree, FinishReason, KvSpan, Request, TokenLogprobs
from branchline.engine.allocation import Allocation
from branchline.engine.blocks import OutOfBlocksError
from branchline.engine.decode import DecodeRunner
from branchline.engine.models.protocol import Models
from branchline.engine.step import StepResult
from branchline.engine.tree import TreeTopology
from decode_worker.admission import AdmissionQueue, Reservation, victims

#: Failed steps in a row after which the engine is given up.
MAX_FAILURES = 3

logger = logging.getLogger(__name__)


class SequenceGoneError(RuntimeError):
    """The sequence has been released, or the engine gave it up."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did for one request. As many log-probabilities as tokens if the request asked for them."""

    lease_id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    drafted: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Granted:
    """A reservation has its blocks and slots; those of the first `held_tokens` tokens with their KV."""

    reservation: Reservation
    held_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Stepped:
    """One iteration is over."""

    progress: tuple[Progress, ...]


@dataclass(frozen=True, slots=True)
class Preemption:
    """Others needed the blocks of these sequences, which are free already."""

    lease_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A step raised; these sequences are lost and their blocks free."""

    lease_ids: tuple[str, ...]
    reason: str


EngineEvent = Granted | Stepped | Preemption | StepFailure


class DecodeLoop:
    """The runner, its sequences by lease id, and the reservations that wait for it."""

    def __init__(self, models: Models, tree: TreeTopology, runner: DecodeRunner) -> None:
        self.models = models
        self.tree = tree
        self.runner = runner
        #: Called on the engine's thread; to be set before the first `reserve`.
        self.listener: Callable[[EngineEvent], None] = _nobody
        self._queue = AdmissionQueue()
        self._allocations: dict[str, Allocation] = {}
        self._lease_ids: dict[Allocation, str] = {}
        self._running: set[Allocation] = set()
        self._failures = 0

    def reserve(self, reservation: Reservation, wait: bool) -> None:
        """Queues a reservation. `Granted` follows when its turn has come, which may be before this returns.

        Raises InvalidRequestError when it can never fit; without `wait` OutOfBlocksError when it doesn't now.
        """
        self.runner.check(reservation.context_length, reservation.max_length, len(reservation.lease_ids))
        self._queue.add(reservation)
        self._admit()
        if not wait and self._queue.withdraw(reservation):
            raise OutOfBlocksError(
                f"no room for {len(reservation.lease_ids)} sequences of {reservation.context_length} tokens: "
                f"{self.runner.pool.free} of {self.runner.pool.total} KV blocks are free, {len(self._allocations)} of "
                f"{self.runner.max_batch} slots are taken, {len(self._queue)} reservations wait"
            )

    def withdraw(self, reservation: Reservation) -> None:
        """Takes a reservation back, granted or not."""
        self._queue.withdraw(reservation)
        for lease_id in reservation.lease_ids:
            self._free(lease_id)
        self._admit()

    def import_kv(self, lease_id: str, span: KvSpan, data: bytes | memoryview) -> None:
        """Raises SequenceGoneError, or InvalidRequestError for a span outside the allocation."""
        self.runner.import_kv(self._allocation(lease_id), span, data)

    def share(self, lease_ids: Collection[str], has_draft_kv: bool) -> None:
        """The hand-off of a group is in the cache: its samples may start from now on, and end, on their own.

        The first of them is sample 0, which took the hand-off. Raises SequenceGoneError when that has been released.
        """
        self._allocation(next(iter(lease_ids)))
        group = [self._allocations[lease_id] for lease_id in lease_ids if lease_id in self._allocations]
        self.runner.share_context(group, has_draft_kv)
        self._admit()  # others with the same context need less room from now on

    def start(self, lease_id: str, request: Request, first_token: int, tree: DraftTree, has_draft_kv: bool) -> None:
        """The sequence takes part from the next step on."""
        allocation = self._allocation(lease_id)
        assert allocation.shared, lease_id
        self.runner.start(allocation, request, first_token, tree, has_draft_kv)
        self._running.add(allocation)

    def release(self, lease_id: str) -> None:
        """Frees the sequence's blocks and slot; no error when it has none."""
        self._free(lease_id)
        self._admit()

    def close(self) -> None:
        """Frees everything. Raises AssertionError when blocks are left over."""
        self._queue.clear()
        for lease_id in tuple(self._allocations):
            self._free(lease_id)
        self.runner.check_integrity()
        assert self.runner.pool.used == 0, f"{self.runner.pool.used} KV blocks are left over"

    def step(self) -> bool:
        """One iteration over all running sequences; False when there are none.

        A step that raises costs the running sequences; after `MAX_FAILURES` in a row the error is passed on.
        """
        if not self._running:
            return False
        try:
            step = self.runner.step()
        except Exception as error:
            released = True
            self._failures += 1
            logger.exception("step failed with %d running sequences", len(self._running))
            self._give_up_running(f"the decode step failed: {type(error).__name__}")
            if self._failures == MAX_FAILURES:
                raise
        else:
            self._failures = 0
            released = bool(step.preempted) or any(result.finish for result in step.results)
            if step.preempted:
                self._preempted(step.preempted)
            self.listener(Stepped(tuple(map(self._progress, step.results))))
        if released:  # else there is less room than before: sequences only grow
            self._admit()
        return True

    def _admit(self) -> None:
        """Grants from the head of the queue on, as long as there is room or something less important to give up."""
        while (head := self._queue.head) is not None:
            if not self._fits(head):
                chosen = victims(head, self.runner.live, _unit, lambda gone: self._fits(head, gone))
                if not chosen:
                    return
                self._preempted(chosen)
            self._queue.pop()
            group = self.runner.allocate(
                head.context_length, head.max_length, len(head.lease_ids), head.rank, head.priority, head.keys
            )
            self._allocations.update(zip(head.lease_ids, group, strict=True))
            self._lease_ids.update(zip(group, head.lease_ids, strict=True))
            self.listener(Granted(head, group[0].held))

    def _fits(self, reservation: Reservation, without: Collection[Allocation] = ()) -> bool:
        samples = len(reservation.lease_ids)
        return self.runner.can_allocate(reservation.context_length, samples, without, reservation.keys)

    def _progress(self, result: StepResult) -> Progress:
        lease_id = self._lease_ids[result.allocation]
        if result.finish is not None:
            self._free(lease_id)
        return Progress(lease_id, result.token_ids, result.finish, result.drafted, result.logprobs)

    def _preempted(self, allocations: Collection[Allocation]) -> None:
        """Ends them, whether or not the runner has released them already."""
        lease_ids = tuple(self._lease_ids[allocation] for allocation in allocations)
        for lease_id in lease_ids:
            self._free(lease_id)
        self.listener(Preemption(lease_ids))

    def _give_up_running(self, reason: str) -> None:
        """What the step that failed had preempted is lost, too."""
        lost = [one for one in self._lease_ids if one in self._running or one.released]
        lease_ids = tuple(self._lease_ids[allocation] for allocation in lost)
        for lease_id in lease_ids:
            self._free(lease_id)
        self.listener(StepFailure(lease_ids, reason))

    def _free(self, lease_id: str) -> None:
        allocation = self._allocations.pop(lease_id, None)
        if allocation is not None:
            del self._lease_ids[allocation]
            self._running.discard(allocation)
            self.runner.release(allocation)

    def _allocation(self, lease_id: str) -> Allocation:
        allocation = self._allocations.get(lease_id)
        if allocation is None:
            raise SequenceGoneError(f"lease {lease_id} has no blocks any more")
        return allocation


def _unit(allocation: Allocation) -> list[Allocation]:
    """What is preempted together: samples hold what only sample 0 will fill, until that has been shared."""
    return [allocation] if allocation.shared else [one for one in allocation.group if not one.released]


def _nobody(_: EngineEvent) -> None:
    pass
