"""What the engine asks of a model. Two providers answer: `vllm` and `reference`.

A model is a function from tokens, positions and an attention context to hidden states; the cache and the
mask live in the context, so one implementation serves prefill, verification and drafting alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from branchline.core import Fingerprint, KvSpan
from branchline.engine.models.errors import ModelError as ModelError


@dataclass(frozen=True)
class KvGeometry:
    """Shape of one model's KV: what the cache allocates and the wire carries."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        assert min(self.num_layers, self.num_kv_heads, self.head_dim) >= 1, self

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def size_of(self, span: KvSpan) -> int:
        """Bytes of a rectangle of it."""
        return math.prod(span.shape(self.head_dim)) * self.dtype.itemsize


@dataclass(frozen=True)
class TargetSpec:
    """Facts about a target model."""

    kv: KvGeometry
    vocab_size: int
    hidden_size: int
    #: Positions that the model was made for; the context limit.
    max_position: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class DraftSpec:
    """Facts about a draft head."""

    kv: KvGeometry
    hidden_size: int
    draft_vocab_size: int


class Attention(Protocol):
    """The attention of one forward pass, bound to a cache, block tables, positions' slots and a mask."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        """Writes key and value to the cache, then attends.

        query `[tokens, heads, head_dim]`, key and value `[tokens, kv_heads, head_dim]`, rotated already;
        returns `[tokens, heads, head_dim]` in query's dtype. The scale is head_dim ** -0.5. Query head h
        reads KV head h // (heads / kv_heads). A sliding window lets a query at position p see the positions above
        p - window, as Hugging Face counts them: the query's own and the window - 1 before it.
        """
        ...


@dataclass(frozen=True)
class TargetOutput:
    """`hidden` `[tokens, hidden_size]` after the final norm, ready for `logits`; `auxiliary`
    `[tokens, 3 * hidden_size]`, the three layers' entering values that EAGLE-3 fuses, None without a draft head.
    """

    hidden: torch.Tensor
    auxiliary: torch.Tensor | None


class TargetModel(Protocol):
    spec: TargetSpec

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> TargetOutput:
        """token_ids, positions: int64 `[tokens]`; positions are below spec.max_position."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden_size]` -> `[tokens, vocab_size]` in the model's dtype."""
        ...


class DraftModel(Protocol):
    """An EAGLE-3 head (Li et al. 2025, arXiv 2503.01840)."""

    spec: DraftSpec
    #: int64 `[draft_vocab_size]`: the target's token id of each draft vocabulary entry.
    target_token_ids: torch.Tensor

    def fuse(self, auxiliary: torch.Tensor) -> torch.Tensor:
        """`[tokens, 3 * hidden_size]` -> `[tokens, hidden_size]`: what `forward` takes for verified tokens."""
        ...

    def forward(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over `[tokens]` pairs of (token j, hidden state of j - 1), at RoPE position j - 1.

        Returns (normed, recurrent), each `[tokens, hidden_size]`: `normed` is for `logits`; `recurrent` is the
        `hidden` of drafted children, for which the target's is not known yet.
        """
        ...

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden_size]` -> `[tokens, draft_vocab_size]`."""
        ...


@dataclass(frozen=True)
class Models:
    """What a worker loads. `fingerprint` is compared at Reserve."""

    name: str
    target: TargetModel
    draft: DraftModel | None
    fingerprint: Fingerprint
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.draft is not None and self.draft.spec.hidden_size != self.target.spec.hidden_size:
            raise ModelError(
                f"the draft head's hidden size {self.draft.spec.hidden_size} differs from the model's "
                f"{self.target.spec.hidden_size}"
            )
