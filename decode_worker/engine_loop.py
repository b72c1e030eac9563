"""The engine's side of the decode worker. Everything here runs on the engine's thread.

The asyncio side (`sessions`) names sequences by lease id and hears of them through the listener. Since commands run
in the order of submission, a release that is submitted after the last frame frees the blocks after that frame
has settled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from branchline.core import DraftTree, FinishReason, KvSpan, Request
from branchline.engine.decode import Allocation, DecodeRunner
from branchline.engine.models.protocol import Models
from branchline.engine.tree import TreeTopology

#: Failed steps in a row after which the engine is given up.
MAX_FAILURES = 3

logger = logging.getLogger(__name__)


class SequenceGoneError(RuntimeError):
    """The sequence has been released, or the engine gave it up."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step did for one request."""

    lease_id: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    drafted: int


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A step raised; these sequences are lost and their blocks free."""

    lease_ids: tuple[str, ...]
    reason: str


Listener = Callable[[list[Progress] | StepFailure], None]


class DecodeLoop:
    """The runner and its sequences by lease id."""

    def __init__(self, models: Models, tree: TreeTopology, runner: DecodeRunner) -> None:
        self.models = models
        self.tree = tree
        self.runner = runner
        #: Called on the engine's thread; to be set before the first `start`.
        self.listener: Listener = _nobody
        self._allocations: dict[str, Allocation] = {}
        self._running: dict[Allocation, str] = {}
        self._failures = 0

    def reserve(self, lease_id: str, context_length: int, max_length: int) -> None:
        """Raises InvalidRequestError when it can never fit, OutOfBlocksError when it doesn't now."""
        assert lease_id not in self._allocations, lease_id
        self.runner.check(context_length, max_length)
        self._allocations[lease_id] = self.runner.allocate(max_length)

    def import_kv(self, lease_id: str, span: KvSpan, data: bytes) -> None:
        """Raises SequenceGoneError, or InvalidRequestError for a span outside the allocation."""
        self.runner.import_kv(self._allocation(lease_id), span, data)

    def start(self, lease_id: str, request: Request, first_token: int, tree: DraftTree, has_draft_kv: bool) -> None:
        """The sequence takes part from the next step on."""
        allocation = self._allocation(lease_id)
        self.runner.start(allocation, request, first_token, tree, has_draft_kv)
        self._running[allocation] = lease_id

    def release(self, lease_id: str) -> None:
        """Frees the sequence's blocks and slot; no error when it has none."""
        allocation = self._allocations.pop(lease_id, None)
        if allocation is not None:
            self._running.pop(allocation, None)
            self.runner.release(allocation)

    def close(self) -> None:
        """Frees everything. Raises AssertionError when blocks are left over."""
        for lease_id in tuple(self._allocations):
            self.release(lease_id)
        self.runner.check_integrity()
        assert self.runner.pool.used == 0, f"{self.runner.pool.used} KV blocks are left over"

    def step(self) -> bool:
        """One iteration over all running sequences; False when there are none.

        A step that raises costs the running sequences; after `MAX_FAILURES` in a row the error is passed on.
        """
        if not self._running:
            return False
        try:
            results = self.runner.step()
        except Exception as error:
            self._failures += 1
            logger.exception("step failed with %d running sequences", len(self._running))
            self._give_up_running(f"the decode step failed: {type(error).__name__}")
            if self._failures == MAX_FAILURES:
                raise
            return True
        self._failures = 0
        progress = []
        for result in results:
            lease_id = self._running[result.allocation]
            progress.append(Progress(lease_id, result.token_ids, result.finish, result.drafted))
            if result.finish is not None:
                self.release(lease_id)
        self.listener(progress)
        return True

    def _give_up_running(self, reason: str) -> None:
        lease_ids = tuple(self._running.values())
        for lease_id in lease_ids:
            self.release(lease_id)
        self.listener(StepFailure(lease_ids, reason))

    def _allocation(self, lease_id: str) -> Allocation:
        allocation = self._allocations.get(lease_id)
        if allocation is None:
            raise SequenceGoneError(f"lease {lease_id} has no blocks any more")
        return allocation


def _nobody(_: list[Progress] | StepFailure) -> None:
    pass
