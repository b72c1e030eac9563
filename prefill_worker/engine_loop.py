"""The engine's side of the prefill worker. Everything here runs on the engine's thread.

Jobs are computed first come, first served, one chunk a step; between two steps the thread takes commands, so a
cancellation takes effect at the next chunk's border, and finished chunks are exported while others wait.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from branchline.core import DraftTree, FinishReason, KvPart, KvSpan, Request
from branchline.engine.models.protocol import KvGeometry, Models
from branchline.engine.prefill import FirstChoice, PrefillRunner, PrefillTask

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
    """A sample's. When it ends the request of every sample, nothing comes after the last of them."""

    sample: int
    choice: FirstChoice


@dataclass(frozen=True, slots=True)
class Drafted:
    """A sample's first tree with the draft row that belongs to its first token, or an empty one and no row.

    Once for each sample, in order. The draft rows in front are complete with the chunks.
    """

    sample: int
    tree: DraftTree
    row: tuple[KvSpan, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event: the job is lost."""

    reason: str


Event = Computed | FirstToken | Drafted | Failed


@dataclass
class _Job:
    task: PrefillTask
    #: The draft head's geometry, where draft KV and trees are wanted.
    draft_kv: KvGeometry | None
    #: Called on the engine's thread.
    listener: Callable[[Event], None]
    finishes: list[FinishReason | None] = field(default_factory=list)
    #: The next sample to draft for.
    sample: int = 0


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

    def begin(
        self, job_id: int, request: Request, samples: int, drafts: bool, listener: Callable[[Event], None]
    ) -> None:
        """Takes blocks and queues the job. Raises InvalidRequestError, OutOfBlocksError."""
        assert job_id not in self._jobs, job_id
        draft_kv = self.runner.draft_kv if drafts else None
        self._jobs[job_id] = _Job(self.runner.begin(request, samples), draft_kv, listener)
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
        """One chunk, or one sample's first tree, of the oldest job; False when none waits.

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
            self._draft(job)
            return job.sample == task.samples
        start, end = self.runner.advance(task)
        self.prefilled_tokens += end - start
        job.listener(Computed(start, end))
        if not task.done:
            return False
        for sample in range(task.samples):
            choice = self.runner.first_token(task, sample)
            job.finishes.append(choice.finish)
            job.listener(FirstToken(sample, choice))
        return all(finish is not None for finish in job.finishes)

    def _draft(self, job: _Job) -> None:
        """The next sample's tree. Its row is read at once: the next one's goes to the same place."""
        sample, geometry, length = job.sample, job.draft_kv, job.task.length
        job.sample += 1
        if geometry is None or job.finishes[sample] is not None:
            job.listener(Drafted(sample, DraftTree()))
            return
        tree = self.runner.draft(job.task, sample)
        span = KvSpan(KvPart.DRAFT, (0, geometry.num_layers), (0, geometry.num_kv_heads), (length, length + 1))
        job.listener(Drafted(sample, tree, (span, self.runner.export(job.task, span))))
