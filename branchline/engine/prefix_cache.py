"""Blocks found again by what is in them: a context that begins like an earlier one takes its blocks over.

A block's key is a digest of the key before it and the block's token ids; the first one's goes on from a digest of all
that the KV depends on. So equal keys mean equal contexts from their first token on, and equal KV: the target's, and the
draft head's, whose row j depends on tokens up to j (docs/architecture.md, end of section 4). Only whole blocks have
keys. Each keeps the fused state of its last position as well: the next draft row is made from it.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence

import torch

from branchline.core import Fingerprint
from branchline.engine.blocks import BlockPool
from branchline.engine.models.protocol import Models


def root_key(fingerprint: Fingerprint, dtype: torch.dtype, block_size: int) -> bytes:
    """What stands before every context's first block."""
    facts = [dict(fingerprint.target), fingerprint.draft, str(dtype), block_size]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def block_keys(before: bytes, token_ids: Sequence[int], block_size: int) -> Iterator[bytes]:
    """The keys of the whole blocks of a context, 32 bytes each; `before` is the root, or the key of the block in front
    of `token_ids`. Cryptographic: whoever could make two contexts with one key could read from another client's."""
    key = before
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        ids = array("q", token_ids[start : start + block_size])
        key = hashlib.sha256(key + ids.tobytes()).digest()
        yield key


class PrefixCache:
    """Finds and remembers blocks of `pool`; not thread-safe, the engine's thread owns it.

    `enabled` false finds nothing and remembers nothing, so that its users need no second path.
    """

    def __init__(
        self, models: Models, pool: BlockPool, block_size: int, *, drafts: bool = True, enabled: bool = True
    ) -> None:
        """Without `drafts` no fused states are kept."""
        self._pool = pool
        self._block_size = block_size
        self.enabled = enabled
        self._root = root_key(models.fingerprint, models.dtype, block_size) if enabled else b""
        #: `[blocks + 1, hidden_size]`: the fused state of each cached block's last position. One row beside the
        #: block's KV rows in all layers: too little to count against `engine.kv_cache_mib`.
        self._fused: torch.Tensor | None = None
        if enabled and drafts:
            shape = (pool.total + 1, models.target.spec.hidden_size)
            self._fused = torch.zeros(shape, dtype=models.dtype, device=models.device)

    def keys(self, token_ids: Sequence[int]) -> tuple[bytes, ...]:
        """Of a context's whole blocks; none when disabled."""
        return tuple(block_keys(self._root, token_ids, self._block_size)) if self.enabled else ()

    def longer(self, keys: tuple[bytes, ...], token_ids: Sequence[int]) -> tuple[bytes, ...]:
        """The keys of `token_ids`' whole blocks, of which the first ones' are `keys`."""
        behind = token_ids[len(keys) * self._block_size :]
        return *keys, *block_keys(keys[-1] if keys else self._root, behind, self._block_size)

    def find(self, keys: Sequence[bytes], tokens: int) -> list[int]:
        """What `take` would take from the front."""
        return self._pool.find(keys[index] for index in range(self._end(keys, tokens)))

    def take(self, keys: Sequence[bytes], tokens: int, first: int = 0) -> list[int]:
        """The blocks of `keys[first:]` that are known, in a line, held once more. At least the last of the context's
        `tokens` is left to compute: nothing is chosen from a cached state."""
        return self._pool.take(keys[index] for index in range(first, self._end(keys, tokens)))

    def _end(self, keys: Sequence[bytes], tokens: int) -> int:
        return min(len(keys), (tokens - 1) // self._block_size)

    def remember(self, blocks: Sequence[int], keys: Sequence[bytes], fused: torch.Tensor | None) -> list[int]:
        """Makes complete blocks, held by the caller, known by their keys; `fused` `[blocks, hidden_size]` are the
        states of their last positions.

        Returns the blocks to use from now on, held once by the caller: its own, or those that were known by these keys
        before, and then the caller's own are released. So there is one block for a content, and whoever holds a block
        holds all before it in its chain, as BlockPool wants it.
        """
        if self._fused is not None:
            assert fused is not None
            self._fused[torch.tensor(blocks, dtype=torch.int64, device=self._fused.device)] = fused
        known = [self._pool.remember(block, key) for block, key in zip(blocks, keys, strict=True)]
        for block, other, key in zip(blocks, known, keys, strict=True):
            if other != block:
                self._pool.take([key])
                self._pool.release([block])
        return known

    def fused(self, block: int) -> torch.Tensor | None:
        """`[1, hidden_size]`, a copy: the block may be evicted while it is still needed. None without a draft head."""
        return None if self._fused is None else self._fused[block : block + 1].clone()
