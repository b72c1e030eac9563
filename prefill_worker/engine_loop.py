"""The engine's side of the prefill worker. Everything here runs on the engine's thread.

A step computes some tokens of some jobs' prompts in one pass (`schedule` says of which), or drafts one sample's first
tree; between two steps the thread takes commands, so a cancellation takes effect at the next chunk's border, and
finished chunks are exported while others wait.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from branchline.core import DraftTree, FinishReason, KvPart, KvSpan, Request
from branchline.engine.models.protocol import KvGeometry, Models
from branchline.engine.prefill import FirstChoice, PrefillRunner, PrefillTask
from branchline.observe.logs import about
from branchline.wire.kv_codec import KvDraft, KvMessage
from prefill_worker.schedule import Waiting, share

#: Failed steps in a row after which the engine is given up.
MAX_FAILURES = 3

logger = logging.getLogger(__name__)


class JobGoneError(RuntimeError):
    """The job has been released, or the engine gave it up."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The target KV of the tokens [start, end) is complete, found in the prefix cache or computed."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A sample's. When it ends the request of every sample, nothing comes after the last of them. `cached_tokens` of
    the context were found in the prefix cache."""

    sample: int
    choice: FirstChoice
    cached_tokens: int


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
    #: When it is served, see schedule.
    rank: float
    #: The draft head's geometry, where draft KV and trees are wanted.
    draft_kv: KvGeometry | None
    #: Called on the engine's thread.
    listener: Callable[[Event], None]
    finishes: list[FinishReason | None] = field(default_factory=list)
    #: The next sample to draft for.
    sample: int = 0


class PrefillLoop:
    """The runner and its jobs by id. `budget`: the most tokens that a step computes."""

    def __init__(self, models: Models, runner: PrefillRunner, budget: int) -> None:
        self.models = models
        self.runner = runner
        #: Context tokens computed since the start; those that were found don't count.
        self.prefilled_tokens = 0
        #: And those that were found instead.
        self.cached_tokens = 0
        self._budget = budget
        self._jobs: dict[int, _Job] = {}
        self._computing: set[int] = set()
        self._drafting: deque[int] = deque()
        self._failures = 0

    def begin(
        self, job_id: int, request: Request, samples: int, drafts: bool, rank: float, listener: Callable[[Event], None]
    ) -> None:
        """Takes blocks and queues the job. Raises InvalidRequestError, OutOfBlocksError."""
        assert job_id not in self._jobs, job_id
        draft_kv = self.runner.draft_kv if drafts else None
        job = self._jobs[job_id] = _Job(self.runner.begin(request, samples), rank, draft_kv, listener)
        self._computing.add(job_id)
        self._report(job)  # what was found can be shipped at once

    def export(self, job_id: int, first: int, spans: Sequence[KvSpan]) -> list[KvMessage]:
        """The frames of complete spans of one part, numbered from `first`. Raises JobGoneError."""
        job = self._jobs.get(job_id)
        if job is None:
            raise JobGoneError(f"prefill job {job_id} has no blocks any more")
        drafts = [KvDraft(number, span, self.runner.size_of(span)) for number, span in enumerate(spans, first)]
        filled = self.runner.export_into(job.task, [(draft.span, draft.data) for draft in drafts])
        # Sealed one by one, as they are filled: the checksum reads what the copy has left in the processor's cache.
        return [draft.seal() for draft, _ in zip(drafts, filled, strict=True)]

    def release(self, job_id: int) -> None:
        """Frees the job's blocks, computed or not; no error when it has none."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._computing.discard(job_id)
            if job_id in self._drafting:
                self._drafting.remove(job_id)
            self.runner.release(job.task)

    def close(self) -> None:
        """Frees everything. Raises AssertionError when blocks are left over."""
        for job_id in tuple(self._jobs):
            self.release(job_id)
        self.runner.check_integrity()
        assert self.runner.pool.used == 0, f"{self.runner.pool.used} KV blocks are left over"

    def step(self) -> bool:
        """One sample's first tree, or else one pass over prompts; False when no job waits.

        A job that can't be served is given up; after `MAX_FAILURES` in a row the error is passed on.
        """
        if self._drafting:  # first: these requests are about to decode
            self._guarded(self._drafting[0], self._draft)
        elif self._computing:
            self._compute(self._plan())
        else:
            return False
        return True

    def _plan(self) -> list[tuple[int, int]]:
        """(job id, tokens) of the next pass."""
        waiting = []
        for job_id in self._computing:
            job = self._jobs[job_id]
            self.runner.take_over(job.task)
            self._report(job)
            waiting.append(Waiting(job_id, job.rank, job.task.left, self.runner.next_key(job.task)))
        return share(self._budget, waiting)

    def _compute(self, turns: Sequence[tuple[int, int]]) -> None:
        if not self._passes(turns):
            # Whose fault it was shows when each is tried alone.
            for turn in turns:
                self._passes([turn])
        for job_id, _ in turns:
            job = self._jobs.get(job_id)
            if job is not None and job.task.done:
                self._guarded(job_id, self._choose)

    def _passes(self, turns: Sequence[tuple[int, int]]) -> bool:
        """Computes; false when that failed, and a job that was alone in it has been given up."""
        jobs = [(self._jobs[job_id], tokens) for job_id, tokens in turns]
        try:
            self.prefilled_tokens += self.runner.advance_many([(job.task, tokens) for job, tokens in jobs])
        except Exception as error:
            if len(turns) == 1:
                self._give_up(turns[0][0], error)
                return True
            logger.warning("a pass over %d prompts failed", len(turns), exc_info=error)
            return False
        for job, _ in jobs:
            self._report(job)
            if not job.task.done:
                self._failures = 0
        return True

    def _report(self, job: _Job) -> None:
        if (completed := job.task.report()) is not None:
            job.listener(Computed(*completed))

    def _guarded(self, job_id: int, work: Callable[[int, _Job], None]) -> None:
        try:
            work(job_id, self._jobs[job_id])
        except Exception as error:  # noqa: BLE001 - logged where the job is given up
            self._give_up(job_id, error)
        else:
            self._failures = 0

    def _give_up(self, job_id: int, error: Exception) -> None:
        """Call it where `error` is handled. Raises it when too many have failed."""
        job = self._jobs[job_id]
        self._failures += 1
        logger.error("prefill failed", extra=about(job.task.request.request_id), exc_info=error)
        self.release(job_id)
        job.listener(Failed(f"the prefill step failed: {type(error).__name__}"))
        if self._failures == MAX_FAILURES:
            raise error

    def _choose(self, job_id: int, job: _Job) -> None:
        """The samples' first tokens."""
        self._computing.discard(job_id)
        self.cached_tokens += job.task.cached
        for sample in range(job.task.samples):
            choice = self.runner.first_token(job.task, sample)
            job.finishes.append(choice.finish)
            job.listener(FirstToken(sample, choice, job.task.cached))
        if not all(finish is not None for finish in job.finishes):
            self._drafting.append(job_id)

    def _draft(self, job_id: int, job: _Job) -> None:
        """The next sample's tree. Its row is read at once: the next one's goes to the same place."""
        sample, geometry, length = job.sample, job.draft_kv, job.task.length
        job.sample += 1
        if job.sample == job.task.samples:
            self._drafting.remove(job_id)
        if geometry is None or job.finishes[sample] is not None:
            job.listener(Drafted(sample, DraftTree()))
            return
        tree = self.runner.draft(job.task, sample)
        span = KvSpan(KvPart.DRAFT, (0, geometry.num_layers), (0, geometry.num_kv_heads), (length, length + 1))
        job.listener(Drafted(sample, tree, (span, self.runner.export(job.task, span))))
