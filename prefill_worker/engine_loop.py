"""The engine's side of the prefill worker. Everything here runs on the engine's thread.

Jobs are computed first come, first served, one chunk a step; between two steps the thread takes commands, so a
cancellation takes effect at the next chunk's border, and finished chunks are exported while others wait.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from branchline.core import DraftTree, FinishReason, KvSpan, Request
from branchline.engine.models.protocol import Models
from branchline.engine.prefill import PrefillRunner, PrefillTask

#: Failed steps in a row after which the engine is given up.
MAX_FAILURES = 3

logger = logging.getLogger(__name__)


class JobGoneError(RuntimeError):
    """The job has been released, or the engine gave it up."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The target KV of the tokens [start, end) is complete."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    """`finish` is set when the token ends the request; nothing comes after it then."""

    token_id: int
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Drafted:
    """The last event: the first tree, and with it all draft rows, or an empty one."""

    tree: DraftTree


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event: the job is lost."""

    reason: str


Event = Computed | FirstToken | Drafted | Failed


@dataclass(frozen=True)
class _Job:
    task: PrefillTask
    drafts: bool
    #: Called on the engine's thread.
    listener: Callable[[Event], None]


class PrefillLoop:
    """The runner and its jobs by id."""

    def __init__(self, models: Models, runner: PrefillRunner) -> None:
        self.models = models
        self.runner = runner
        #: Context tokens computed since the start.
        self.prefilled_tokens = 0
        self._jobs: dict[int, _Job] = {}
        self._waiting: deque[int] = deque()
        self._failures = 0

    def begin(self, job_id: int, request: Request, drafts: bool, listener: Callable[[Event], None]) -> None:
        """Takes blocks and queues the job. Raises InvalidRequestError, OutOfBlocksError."""
        assert job_id not in self._jobs, job_id
        self._jobs[job_id] = _Job(self.runner.begin(request), drafts, listener)
        self._waiting.append(job_id)

    def export(self, job_id: int, spans: Sequence[KvSpan]) -> list[bytes]:
        """The canonical bytes of complete spans. Raises JobGoneError."""
        job = self._jobs.get(job_id)
        if job is None:
            raise JobGoneError(f"prefill job {job_id} has no blocks any more")
        return [self.runner.export(job.task, span) for span in spans]

    def release(self, job_id: int) -> None:
        """Frees the job's blocks, computed or not; no error when it has none."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            if job_id in self._waiting:
                self._waiting.remove(job_id)
            self.runner.release(job.task)

    def close(self) -> None:
        """Frees everything. Raises AssertionError when blocks are left over."""
        for job_id in tuple(self._jobs):
            self.release(job_id)
        self.runner.check_integrity()
        assert self.runner.pool.used == 0, f"{self.runner.pool.used} KV blocks are left over"

    def step(self) -> bool:
        """One chunk, or the first tree, of the oldest job; False when none waits.

        A step that raises costs its job; after `MAX_FAILURES` in a row the error is passed on.
        """
        if not self._waiting:
            return False
        job_id = self._waiting[0]
        job = self._jobs[job_id]
        try:
            finished = self._advance(job)
        except Exception as error:
            self._failures += 1
            logger.exception("prefill failed request=%s", job.task.request.request_id)
            self.release(job_id)
            job.listener(Failed(f"the prefill step failed: {type(error).__name__}"))
            if self._failures == MAX_FAILURES:
                raise
            return True
        self._failures = 0
        if finished:
            self._waiting.popleft()
        return True

    def _advance(self, job: _Job) -> bool:
        """One unit of work; True when the job needs no more."""
        task = job.task
        if task.done:
            job.listener(Drafted(self.runner.draft(task)))
            return True
        start, end = self.runner.advance(task)
        self.prefilled_tokens += end - start
        job.listener(Computed(start, end))
        if not task.done:
            return False
        token_id, finish = self.runner.first_token(task)
        job.listener(FirstToken(token_id, finish))
        if finish is None and not job.drafts:
            job.listener(Drafted(DraftTree()))
        return finish is not None or not job.drafts
