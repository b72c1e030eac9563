"""Decode: a batch of requests that join and leave between iterations. The host's side of the iteration.

Synchronous; owned by one engine thread. On CUDA an iteration is launched before the last one's tokens are read, so the
host's knowledge of a sequence's length lags by one iteration, and blocks are allocated that far ahead.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch

from branchline.config import EngineConfig
from branchline.core import DraftTree, InvalidRequestError, KvSpan, Request
from branchline.engine.allocation import Allocation as Allocation
from branchline.engine.allocations import Allocations
from branchline.engine.blocks import BlockPool
from branchline.engine.cache import BlockTables
from branchline.engine.draft import TreeDrafter
from branchline.engine.execute import Executor, executor_for
from branchline.engine.flight import Landing
from branchline.engine.grammar import Grammar
from branchline.engine.iteration import DecodeIteration
from branchline.engine.load_budget import LoadBudget
from branchline.engine.models.protocol import KvGeometry, Models
from branchline.engine.prefix_cache import PrefixCache
from branchline.engine.programs import Batch, execute
from branchline.engine.sampling import SamplingVariant
from branchline.engine.sequence import KvCaches, check_token_ids
from branchline.engine.state import BatchState, Start
from branchline.engine.step import Flight, Step, StepResult
from branchline.engine.tree import TreeTopology

#: Tokens by which the context that attention reads grows at a time on the CPU: few shapes, little waste. On CUDA the
#: whole block table is passed, and the kernels stop at each sequence's length.
CONTEXT_BUCKET = 128


class DecodeRunner:
    """Runs the batch on one device. Not thread-safe by design.

    `pipelined` launches an iteration before the last one's results are read; by default on CUDA only. `load_budget`
    limits the nodes that are drafted, by load; without it every request gets what it may have.
    """

    def __init__(
        self,
        models: Models,
        engine: EngineConfig,
        tree: TreeTopology,
        *,
        executor: Executor | None = None,
        pipelined: bool | None = None,
        load_budget: LoadBudget | None = None,
    ) -> None:
        device = models.device
        self.caches = KvCaches(models, engine, tree)
        self.max_batch = engine.max_batch
        self.max_model_len = self.caches.max_model_len
        self.state = BatchState.empty(engine.max_batch, tree.num_nodes, models.target.spec.vocab_size, device)
        self._models = models
        self.tree = tree
        self._drafter: TreeDrafter | None = None
        if models.draft is not None and self.caches.draft is not None:
            self._drafter = TreeDrafter(models.draft, self.caches.draft, models.target.spec.max_position)
        self._iterations: dict[int, DecodeIteration] = {}
        self._pipelined = device.type == "cuda" if pipelined is None else pipelined
        lead = (tree.depth + 1) * (1 if self._pipelined else 0)
        self._prefix = PrefixCache(
            models, self.pool, self.caches.block_size, drafts=False, enabled=engine.prefix_caching
        )
        self._allocations = Allocations(self.caches, self._prefix, engine.max_batch, lead, device)
        self._executor = executor or executor_for(device, idle_slot=engine.max_batch)
        self._buckets = sorted({size for size in engine.batch_buckets if size < engine.max_batch} | {engine.max_batch})
        self._load_budget = load_budget
        self._running: list[Allocation] = []
        self._flight: Flight | None = None
        self._slots = torch.empty(0, dtype=torch.int64, device=device)
        self._slots_of: list[int] = []

    @property
    def pool(self) -> BlockPool:
        return self.caches.pool

    @property
    def target_kv(self) -> KvGeometry:
        return self.caches.target_kv

    @property
    def draft_kv(self) -> KvGeometry | None:
        return self.caches.draft_kv

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def live(self) -> list[Allocation]:
        """The allocations that have not been released."""
        return list(self._allocations.live)

    def check_integrity(self) -> None:
        self._allocations.check_integrity()
        assert all(not allocation.released for allocation in self._running), "a released request runs"

    def check(self, context_length: int, max_length: int, samples: int = 1) -> None:
        """Raises InvalidRequestError for a sequence, or for samples, that could never fit."""
        if not 0 < context_length < max_length:
            raise InvalidRequestError(f"a context of {context_length} tokens does not fit a sequence of {max_length}")
        if context_length >= self.max_model_len:
            raise InvalidRequestError(
                f"the context has {context_length} tokens; at most {self.max_model_len - 1} leave room for an answer"
            )
        if not self._allocations.could_fit(context_length, samples):
            raise InvalidRequestError(f"{samples} samples of {context_length} tokens can't be decoded at once here")

    def keys(self, context: Sequence[int]) -> tuple[bytes, ...] | None:
        """For `can_allocate` and `allocate`: by them a context finds the blocks of others, and is found. None when
        nothing is kept here. Reads what never changes: any thread may call it."""
        return self._prefix.keys(context) if self._prefix.enabled else None

    def can_allocate(
        self,
        context_length: int,
        samples: int = 1,
        without: Collection[Allocation] = (),
        keys: tuple[bytes, ...] | None = None,
    ) -> bool:
        """Whether slots and blocks are free, or would be `without` some of the live allocations, with a block left for
        each of the others to grow."""
        return self._allocations.can_allocate(context_length, samples, without, keys)

    def allocate(
        self,
        context_length: int,
        max_length: int,
        samples: int = 1,
        rank: float = 0.0,
        priority: int = 0,
        keys: tuple[bytes, ...] | None = None,
    ) -> list[Allocation]:
        """Slots and the context's blocks for each sample; the first takes the hand-off, and the others share the blocks
        that the context fills. The first `held` tokens' KV is here already: nothing may be imported there. More blocks
        are added while they run; when there are none, the allocation of the largest `rank` is preempted. Raises
        OutOfBlocksError, and takes nothing, when slots or blocks are short now."""
        end = min(max_length, self.max_model_len)
        return self._allocations.allocate(context_length, end, samples, rank, priority, keys)

    def import_kv(self, allocation: Allocation, span: KvSpan, data: bytes | memoryview) -> None:
        """Scatters a span's canonical bytes into the cache. Raises InvalidRequestError when it lies outside the
        allocation, or where others read, or carries the wrong number of bytes."""
        assert not allocation.released
        if span.tokens[0] < allocation.known * self.caches.block_size:
            raise InvalidRequestError(f"KV span: tokens start at {span.tokens[0]}, where shared blocks are")
        self.caches.load(allocation.blocks, span, data)

    @torch.inference_mode()
    def share_context(self, group: list[Allocation], has_draft_kv: bool) -> None:
        """Copies the context's last rows, those in a block that it doesn't fill, from the first sample to the others.
        To be called once, when all of the context's KV is in the cache, the draft head's too if `has_draft_kv`, and
        before any of them starts."""
        self._allocations.share_context(group, has_draft_kv or self.caches.draft is None)

    def start(
        self,
        allocation: Allocation,
        request: Request,
        first_token: int,
        tree: DraftTree,
        has_draft_kv: bool,
        grammar: Grammar | None = None,
    ) -> None:
        """Joins the batch from the next step on. The target's KV of the whole context is in the cache; draft rows
        1 … context length too if `has_draft_kv`, else the drafter starts cold. The tree is cut to what fits this
        worker's own. `grammar` has advanced over `first_token`. Raises InvalidRequestError when the request doesn't fit
        the allocation."""
        assert not allocation.released
        assert not allocation.running
        context = len(request.context)
        remaining = min(request.max_length, allocation.max_length) - context - 1
        if context != allocation.context_length:
            raise InvalidRequestError(f"{allocation.context_length} context tokens are promised, not {context}")
        if remaining < 1:
            raise InvalidRequestError(f"{allocation.max_length} tokens are promised; a context of {context} fills them")
        check_token_ids((first_token, *tree.tokens), self._models.target.spec.vocab_size)
        budget = self.tree.num_nodes if request.draft_nodes is None else request.draft_nodes
        budget = min(budget, self.tree.num_nodes)
        tree = tree.cut(budget, self.tree.cut(budget).depth)
        draft_start = 1 if has_draft_kv else context + 1
        self.state.load(allocation.slot, Start(request, first_token, tree, budget, draft_start, remaining))
        drafts = has_draft_kv or self.caches.draft is None
        allocation.start(request, first_token, budget, len(tree), drafts, grammar)
        self._running.append(allocation)

    def step(self) -> Step:
        """One iteration over all running requests; those that finish have left the batch.

        When iterations are pipelined, the results are the last step's.
        """
        if not self._running:
            self._flight = None  # nobody waits for it: its requests were released
            return Step()
        began = time.perf_counter()
        preempted = self._allocations.grow(self._running)
        for allocation in preempted:
            self.release(allocation)
        landed, self._flight = self._flight, None
        results: list[StepResult] = []
        if landed is not None and any(allocation.grammar for allocation in self._running):
            results, landed = self._collect(landed, None), None  # a grammar must know the tokens before it can go on
        launched = self._launch() if self._running else None
        if self._pipelined:
            self._flight = launched
        else:
            landed = launched
        return Step(results + (self._collect(landed, began) if landed else []), preempted)

    def release(self, allocation: Allocation) -> None:
        """Leaves the batch if it is in it, and frees blocks and slot. Idempotent."""
        if allocation in self._running:
            self._leave(allocation)
        self._allocations.release(allocation)

    @torch.inference_mode()
    def _launch(self) -> Flight:
        # By length, so that attention on the CPU reads no further for a short one than for its neighbours.
        batch = sorted(self._running, key=self._width, reverse=True)
        requests = [allocation.request for allocation in batch if allocation.request]
        slots = self._bucket([allocation.slot for allocation in batch])
        wanted = max(allocation.budget for allocation in batch)
        if self._load_budget is not None and wanted:
            wanted = min(wanted, self._load_budget.choose(len(slots)))
        iteration = self.iteration(wanted)
        variant = SamplingVariant.of(requests)
        # A padding row is no longer than any other.
        widths = [self._width(allocation) for allocation in batch]
        widths += widths[-1:] * (len(slots) - len(batch))
        tables = BlockTables(self._allocations.block_tables.index_select(0, slots)[:, : widths[0]], tuple(widths))
        grammars = {row: allocation.grammar for row, allocation in enumerate(batch) if allocation.grammar is not None}
        iteration.observe("launch")
        emission = execute(self._executor, iteration, Batch(slots, tables, variant, grammars))
        rows = []
        for allocation in batch:
            rows.append((allocation, min(allocation.drafted, iteration.nodes)))
            allocation.drafted = min(allocation.budget, iteration.nodes)
        return Flight(len(slots), iteration.nodes, rows, Landing(emission))

    def _collect(self, flight: Flight, began: float | None) -> list[StepResult]:
        """The results of those who are still there: a pipelined iteration may bring tokens of a request that was
        released, or nothing for one that finished, meanwhile. `began`: when the step did that waits for this iteration
        and does little else, if it tells how long one takes."""
        wanted = [allocation.request.logprobs if allocation.request else None for allocation, _ in flight.rows]
        results = []
        landed = flight.landing.rows(wanted)
        if self._load_budget is not None and began is not None:
            paths = [
                (drafted, row.path) for (_, drafted), row in zip(flight.rows, landed, strict=True) if row.token_ids
            ]
            self._load_budget.learn(flight.bucket, flight.nodes, time.perf_counter() - began, paths)
        for (allocation, drafted), row in zip(flight.rows, landed, strict=True):
            if allocation.released or not allocation.running:
                continue
            results.append(StepResult(allocation, row.token_ids, row.finish, drafted, row.logprobs))
            allocation.advance(row.token_ids, flight.nodes > 0 or self.caches.draft is None)
            if allocation.grammar is not None:
                allocation.grammar.advance(row.token_ids)
            if row.finish is not None:
                self._leave(allocation)
        return results

    def _leave(self, allocation: Allocation) -> None:
        self._running.remove(allocation)
        self.state.clear(allocation.slot)
        allocation.leave()

    def iteration(self, budget: int) -> DecodeIteration:
        """The iteration for the smallest power of two that holds `budget` nodes, or for the whole tree."""
        nodes = min(self.tree.num_nodes, 1 << (budget - 1).bit_length()) if budget else 0
        if nodes not in self._iterations:
            self._iterations[nodes] = DecodeIteration(
                self._models.target, self.caches.target, self._drafter, self.state, self.tree.cut(nodes)
            )
        return self._iterations[nodes]

    def _width(self, allocation: Allocation) -> int:
        """Blocks of its block table that the iteration reads."""
        widest = self._allocations.block_tables.shape[1]
        if self._pipelined:
            return widest
        rows = allocation.length + self.caches.headroom
        return min(-(-rows // CONTEXT_BUCKET) * -(-CONTEXT_BUCKET // self.caches.block_size), widest)

    def _bucket(self, slots: list[int]) -> torch.Tensor:
        """The slots on the device, padded to a batch bucket with the state's padding row."""
        size = next(size for size in self._buckets if size >= len(slots))
        padded = slots + [self.max_batch] * (size - len(slots))
        if padded != self._slots_of:
            self._slots, self._slots_of = self._slots.new_tensor(padded), padded
        return self._slots
