"""Prefill: contexts' KV, chunk by chunk, then the first token and the first draft tree of each.

Synchronous; owned by one engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from branchline.config import EngineConfig
from branchline.core import (
    MAX_SAMPLES,
    DraftTree,
    FinishReason,
    InvalidRequestError,
    KvPart,
    KvSpan,
    Request,
    TokenLogprobs,
)
from branchline.engine.attention import PagedAttention
from branchline.engine.blocks import BlockPool, OutOfBlocksError
from branchline.engine.cache import BlockTables
from branchline.engine.draft import DraftHeads, Root, TreeDrafter
from branchline.engine.growing import grower_for
from branchline.engine.logit_edits import check_edits
from branchline.engine.models.protocol import Attention, KvGeometry, Models
from branchline.engine.prefill_task import FirstChoice as FirstChoice
from branchline.engine.prefill_task import PrefillTask as PrefillTask
from branchline.engine.prefix_cache import PrefixCache
from branchline.engine.sampling import SamplingTensors, SamplingVariant, choose_token, token_logprobs
from branchline.engine.sequence import KvCaches, check_token_ids
from branchline.engine.split_attention import SplitAttention
from branchline.engine.tree import TreeTopology


class PrefillRunner:
    """Computes prompts on one device. Not thread-safe by design."""

    def __init__(self, models: Models, engine: EngineConfig, tree: TreeTopology) -> None:
        self._models = models
        self._caches = KvCaches(models, engine, tree)
        self._chunk = engine.prefill_chunk_tokens
        self._device = models.device
        self._drafter: TreeDrafter | None = None
        self._grower = grower_for(tree, models.device)
        if models.draft is not None and self._caches.draft is not None:
            self._drafter = TreeDrafter(models.draft, self._caches.draft, models.target.spec.max_position)
        self._prefix = PrefixCache(
            models,
            self._caches.pool,
            self._caches.block_size,
            drafts=self._drafter is not None,
            enabled=engine.prefix_caching,
        )
        self.max_model_len = self._caches.max_model_len

    @property
    def pool(self) -> BlockPool:
        return self._caches.pool

    @property
    def target_kv(self) -> KvGeometry:
        return self._caches.target_kv

    @property
    def draft_kv(self) -> KvGeometry | None:
        return self._caches.draft_kv

    def check_integrity(self) -> None:
        self.pool.check_integrity()

    def begin(self, request: Request, samples: int = 1) -> PrefillTask:
        """Takes the blocks, as many from the front as are cached. Sample i is the request's `sample_index` + i. Raises
        InvalidRequestError for a context that is too long or has an id outside the vocabulary, OutOfBlocksError when
        blocks are short now."""
        if not 1 <= samples <= MAX_SAMPLES - request.sampling.sample_index:
            raise InvalidRequestError(f"samples must be between 1 and {MAX_SAMPLES} in all, got {samples}")
        context = request.context
        if len(context) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(context)} tokens; at most {self.max_model_len - 1} leave room for an answer"
            )
        check_token_ids(context, self._models.target.spec.vocab_size)
        check_edits(request, self._models.target.spec.vocab_size)
        keys = self._prefix.keys(context)
        found = self._prefix.take(keys, len(context))
        try:
            blocks = found + self.pool.allocate(self._caches.blocks_for(len(context)) - len(found))
        except OutOfBlocksError:
            self.pool.release(found)
            raise
        task = PrefillTask(
            request,
            samples,
            blocks,
            torch.tensor([blocks], dtype=torch.int64, device=self._device),
            torch.tensor(context, dtype=torch.int64, device=self._device),
            keys,
        )
        if found:
            self._skip_to(task, len(found))
        return task

    def take_over(self, task: PrefillTask) -> None:
        """Puts blocks that others have completed meanwhile in the place of the task's own that are not complete."""
        first = task.computed // self._caches.block_size
        found = self._prefix.take(task.keys, task.length, first)
        if found:
            own = task.blocks[first : first + len(found)]
            self._replace(task, first, found)
            self.pool.release(own)
            self._skip_to(task, first + len(found))

    def next_key(self, task: PrefillTask) -> bytes | None:
        """The key of the block that the task's next token belongs to, if the task could take that one over from another
        task that completes it first."""
        index = task.computed // self._caches.block_size
        return task.keys[index] if index < min(len(task.keys), (task.length - 1) // self._caches.block_size) else None

    def advance(self, task: PrefillTask) -> tuple[int, int]:
        """Computes the next chunk; returns the token range whose target KV is complete since the last call."""
        self.advance_many([(task, self._chunk)])
        completed = task.report()
        assert completed is not None
        return completed

    @torch.inference_mode()
    def advance_many(self, turns: Sequence[tuple[PrefillTask, int]]) -> int:
        """Computes the next tokens of several contexts in one pass of the target, at least 1 and at most so many of
        each; blocks that others have completed meanwhile are taken over first. Returns how many in all. When it raises,
        the tasks can be tried again."""
        chunks = []
        for task, tokens in turns:
            assert not task.done
            assert not task.released
            assert tokens >= 1, tokens
            self.take_over(task)
            chunks.append((task, task.computed, min(task.computed + tokens, task.length)))
        sizes = [end - start for _, start, end in chunks]
        output = self._models.target.forward(
            torch.cat([task.token_ids[start:end] for task, start, end in chunks]),
            torch.cat([torch.arange(start, end, device=self._device) for _, start, end in chunks]),
            SplitAttention([self._attention(*chunk) for chunk in chunks], sizes),
        )
        fused: Sequence[torch.Tensor | None] = [None] * len(chunks)
        if self._drafter is not None:
            assert output.auxiliary is not None
            fused = torch.split(self._drafter.model.fuse(output.auxiliary), sizes)
        for chunk, states in zip(chunks, fused, strict=True):
            if states is not None:
                self._extend_draft(*chunk, states)
        for (task, start, end), hidden, states in zip(chunks, torch.split(output.hidden, sizes), fused, strict=True):
            task.last_hidden = hidden[-1:].clone()  # the rest of the pass isn't kept for it
            task.last_fused = None if states is None else states[-1:].clone()
            task.computed = end
            self._remember(task, start, end, states)
        return sum(sizes)

    @torch.inference_mode()
    def first_token(self, task: PrefillTask, sample: int = 0, allowed: torch.Tensor | None = None) -> FirstChoice:
        """Chooses a sample's first token, with the same noise as decode would; among the `allowed` ones (bool
        `[vocab]`) if a grammar says so."""
        assert task.done
        assert task.last_hidden is not None
        rows, variant = self._sampling(task, sample)
        logits = self._models.target.logits(task.last_hidden)
        free = logits if allowed is None else logits.masked_fill(~allowed.to(self._device), float("-inf"))
        chosen = choose_token(free, self._scalar(task.length), rows, variant)
        token_id = task.first_tokens[sample] = int(chosen.item())
        logprobs = None
        if task.request.logprobs is not None:
            own, top_ids, top = token_logprobs(logits[None], chosen[None])
            likeliest = zip(top_ids[0, 0].tolist(), top[0, 0].tolist(), strict=True)
            logprobs = TokenLogprobs(own.item(), tuple(likeliest)[: task.request.logprobs])
        finish = task.request.finish_after(token_id)
        if finish is None and task.length + 1 >= self.max_model_len:
            finish = FinishReason.LENGTH
        return FirstChoice(token_id, finish, logprobs)

    @torch.inference_mode()
    def draft(self, task: PrefillTask, sample: int = 0) -> DraftTree:
        """A sample's first tree, after its `first_token`; completes the draft rows 1 … length, of which the last is the
        sample's own: another sample's tree overwrites it. Empty without a draft head."""
        if self._drafter is None or self._grower is None or task.request.draft_nodes == 0:
            return DraftTree()
        assert task.last_fused is not None
        # Whole blocks of the context may be others' too; the rows from here on lie behind them.
        assert len(task.keys) * self._caches.block_size <= task.length
        root, one = self._scalar(task.length), self._scalar(1)
        table = self._table(task, task.length + self._caches.headroom)
        heads = self._extend(table, self._scalar(task.first_tokens[sample])[None], task.last_fused, task.length)
        keep = torch.ones(1, dtype=torch.bool, device=self._device)
        rows, variant = self._sampling(task, sample)
        tree = self._grower.grow(self._drafter, Root(heads, root, one, keep, table, rows, variant))
        nodes = task.request.draft_nodes
        columns = (column[0, :nodes].tolist() for column in (tree.tokens, tree.parents, tree.scores))
        return DraftTree(*map(tuple, columns))

    def export(self, task: PrefillTask, span: KvSpan) -> bytes:
        """Canonical bytes of a span that is complete. Raises InvalidRequestError when it lies outside."""
        assert not task.released
        return self._caches.read(task.blocks, span)

    def size_of(self, span: KvSpan) -> int:
        """Bytes of a span."""
        kv = self.target_kv if span.part is KvPart.TARGET else self.draft_kv
        assert kv is not None, "a span of the draft's KV without a draft head"
        return kv.size_of(span)

    def export_into(self, task: PrefillTask, pieces: Sequence[tuple[KvSpan, memoryview]]) -> Iterator[None]:
        """As `export`, into buffers of the spans' sizes, all of one part; yields once for each that is complete."""
        assert not task.released
        return self._caches.read_into(task.blocks, pieces)

    def release(self, task: PrefillTask) -> None:
        """Gives the blocks back. Idempotent."""
        if not task.released:
            task.released = True
            self.pool.release(task.blocks)

    def _attention(self, task: PrefillTask, start: int, end: int) -> Attention:
        triangle = torch.ones((1, end - start, end - start), dtype=torch.bool, device=self._device).tril()
        offsets = torch.arange(end - start, device=self._device)[None]
        return PagedAttention.over(
            self._caches.target,
            self._table(task, end),
            self._scalar(start),
            self._scalar(0),
            triangle,
            offsets,
            torch.ones_like(offsets, dtype=torch.bool),
            line_from=start,
        )

    def _skip_to(self, task: PrefillTask, blocks: int) -> None:
        """The first `blocks` blocks are cached ones: the task goes on behind them."""
        end = blocks * self._caches.block_size
        task.cached += end - task.computed
        task.computed = end
        task.last_fused = self._prefix.fused(task.blocks[blocks - 1])

    def _remember(self, task: PrefillTask, start: int, end: int, fused: torch.Tensor | None) -> None:
        """Makes the blocks that the chunk completed known. `fused` `[end - start, hidden_size]`."""
        size = self._caches.block_size
        first, last = start // size, min(end // size, len(task.keys))
        if first < last:
            states = None if fused is None else fused[(first + 1) * size - 1 - start :: size]
            own = task.blocks[first:last]
            known = self._prefix.remember(own, task.keys[first:last], states)
            if known != own:
                self._replace(task, first, known)

    def _replace(self, task: PrefillTask, first: int, blocks: list[int]) -> None:
        task.blocks[first : first + len(blocks)] = blocks
        task.block_table[0, first : first + len(blocks)] = task.block_table.new_tensor(blocks)

    def _extend_draft(self, task: PrefillTask, start: int, end: int, fused: torch.Tensor) -> None:
        """Draft rows start … end - 1: row j pairs token j with the fused state at j - 1, so a chunk's first row takes
        its state from the chunk before, and its last state waits for the next token."""
        if task.last_fused is not None:
            fused, first = torch.cat([task.last_fused, fused]), start
        else:
            first = 1  # row 0 has no state before it and does not exist
        if end > first:
            self._extend(self._table(task, end), task.token_ids[None, first:end], fused[:-1], first)

    def _extend(self, table: BlockTables, token_ids: torch.Tensor, fused: torch.Tensor, first: int) -> DraftHeads:
        assert self._drafter is not None
        count = self._scalar(token_ids.shape[1])
        return self._drafter.extend(token_ids, fused, self._scalar(first), count, self._scalar(1), table)

    def _table(self, task: PrefillTask, tokens: int) -> BlockTables:
        """The part of the block table that covers `tokens` rows: attention reads no further."""
        return BlockTables(task.block_table[:, : -(-tokens // self._caches.block_size)])

    def _scalar(self, value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int64, device=self._device)

    def _sampling(self, task: PrefillTask, sample: int) -> tuple[SamplingTensors, SamplingVariant]:
        request = task.request
        sampling = replace(request.sampling, sample_index=request.sampling.sample_index + sample)
        tensors = SamplingTensors.empty(1, self._models.target.spec.vocab_size, self._device)
        tensors.load(0, replace(request, sampling=sampling), None)
        return tensors, SamplingVariant.of([request])
