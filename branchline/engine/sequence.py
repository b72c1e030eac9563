"""What prefill and decode agree on about a sequence's place in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from branchline.config import ConfigError, EngineConfig
from branchline.core import InvalidRequestError, KvPart, KvSpan
from branchline.engine.blocks import BlockPool, blocks_for
from branchline.engine.cache import PagedKvCache
from branchline.engine.kv_copies import KvCopies, Place, copies_of
from branchline.engine.models.protocol import Models
from branchline.engine.tree import TreeTopology

MIB = 2**20


class KvCaches:
    """The target's and the draft head's paged caches over one pool of blocks: a block id names a place in both."""

    def __init__(self, models: Models, engine: EngineConfig, tree: TreeTopology) -> None:
        """Raises ConfigError when `engine.kv_cache_mib` can't hold one sequence of full length."""
        target = models.target.spec
        self.block_size = engine.block_size
        self.max_model_len = min(engine.max_model_len or target.max_position, target.max_position)
        #: Rows behind a sequence's tokens: an accepted path, then the root with the next tree, grown or verified.
        self.headroom = tree.depth + 1 + max(tree.num_nodes + 1, tree.draft_rows)
        self.target_kv = target.kv
        self.draft_kv = models.draft.spec.kv if models.draft is not None and tree.num_nodes > 0 else None
        per_token = sum(kv.bytes_per_token for kv in (self.target_kv, self.draft_kv) if kv is not None)
        blocks = engine.kv_cache_mib * MIB // (per_token * self.block_size) - 1  # one is the null block
        needed = self.blocks_for(self.max_model_len)
        if blocks < needed:
            raise ConfigError(
                f"engine.kv_cache_mib: {engine.kv_cache_mib} MiB hold {max(blocks, 0)} blocks, but one sequence of "
                f"{self.max_model_len} tokens (engine.max_model_len) needs {needed}"
            )
        self.pool = BlockPool(blocks)
        self.target = PagedKvCache(self.target_kv, blocks, self.block_size, models.device)
        self.draft = PagedKvCache(self.draft_kv, blocks, self.block_size, models.device) if self.draft_kv else None
        self._target_copies = copies_of(self.target)
        self._draft_copies = copies_of(self.draft) if self.draft is not None else None

    def blocks_for(self, tokens: int) -> int:
        """Blocks of a sequence that can reach `tokens` tokens, headroom included."""
        return blocks_for(tokens + self.headroom, self.block_size)

    def read(self, blocks: list[int], span: KvSpan) -> bytes:
        """A span of a sequence as canonical bytes."""
        copies, place, size = self._locate(blocks, span)
        data = bytearray(size)
        for _ in copies.read([(place, memoryview(data))]):
            pass
        return bytes(data)

    def read_into(self, blocks: list[int], pieces: Sequence[tuple[KvSpan, memoryview]]) -> Iterator[None]:
        """Spans of one part of a sequence, each into a buffer of its size. Yields once for each that is complete, in
        their order."""
        assert len({span.part for span, _ in pieces}) <= 1, "spans of both caches"
        located = [(*self._locate(blocks, span), out) for span, out in pieces]
        assert all(out.nbytes == size for _, _, size, out in located), "a buffer of another size"
        if located:
            yield from located[0][0].read([(place, out) for _, place, _, out in located])

    def load(self, blocks: list[int], span: KvSpan, data: bytes | memoryview) -> None:
        """The inverse of `read`. Raises InvalidRequestError when the span or the number of bytes is wrong."""
        copies, place, expected = self._locate(blocks, span)
        if len(data) != expected:
            raise InvalidRequestError(f"KV span of {expected} bytes carries {len(data)}")
        copies.load(place, data)

    def _locate(self, blocks: list[int], span: KvSpan) -> tuple[KvCopies, Place, int]:
        """The way to the span's cache, its place there, and its bytes. Its slots are runs: most blocks lie in a row."""
        cache = self.target if span.part is KvPart.TARGET else self.draft
        copies = self._target_copies if span.part is KvPart.TARGET else self._draft_copies
        if cache is None or copies is None:
            raise InvalidRequestError("draft KV, but no draft head is in use here")
        limits = {
            "layers": cache.geometry.num_layers,
            "heads": cache.geometry.num_kv_heads,
            "tokens": len(blocks) * self.block_size,
        }
        for name, limit in limits.items():
            end = getattr(span, name)[1]
            if end > limit:
                raise InvalidRequestError(f"KV span: {name} end at {end}, but there are {limit}")
        runs: list[range] = []
        at, end = span.tokens
        while at < end:
            offset = at % self.block_size
            slot = blocks[at // self.block_size] * self.block_size + offset
            size = min(end - at, self.block_size - offset)
            if runs and runs[-1].stop == slot:
                runs[-1] = range(runs[-1].start, slot + size)
            else:
                runs.append(range(slot, slot + size))
            at += size
        return copies, Place(span.layers, span.heads, runs), cache.geometry.size_of(span)


def check_token_ids(token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raises InvalidRequestError naming the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"token id {token_id} is not below the vocabulary size {vocab_size}")
