"""Values that both sides of the wire share. Standard library only.

Everything here is immutable: a request, a sampling rule, a draft tree, a KV frame. The wire layer turns
them into messages and back (`branchline.wire.convert`); the engine turns them into tensors.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

#: Stop token ids that one request may name; the decode step compares against a fixed number of them.
MAX_STOP_TOKEN_IDS = 8


class InvalidRequestError(ValueError):
    """A request that can never succeed; the message is meant for the client. Maps to INVALID_ARGUMENT."""


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the model's context limit


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the target's logits.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch the two filters off. The same `seed` gives
    the same tokens with any tree, in any batch and after a failover (docs/architecture.md, section 5).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise InvalidRequestError(f"temperature must be between 0 and 100, got {self.temperature}")
        if not (math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidRequestError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise InvalidRequestError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 <= self.seed < 2**63:
            raise InvalidRequestError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request as workers see it: token ids only, all defaults resolved by the gateway.

    `emitted` are tokens that the client already has (after a failover); they follow `prompt` in the
    context and count towards `max_tokens`. `stop_token_ids` holds the model's EOS ids unless the client
    asked to ignore them, so workers need no tokenizer.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    emitted: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequestError("the prompt is empty")
        if self.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if len(self.emitted) >= self.max_tokens:
            raise InvalidRequestError(f"all {self.max_tokens} tokens are emitted already")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(f"at most {MAX_STOP_TOKEN_IDS} stop token ids, got {len(self.stop_token_ids)}")

    @property
    def context(self) -> tuple[int, ...]:
        """All token ids that the next token follows: the prompt, then what was emitted."""
        return self.prompt + self.emitted

    @property
    def max_length(self) -> int:
        """The most tokens the sequence can reach, prompt included."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True, slots=True)
class DraftTree:
    """A draft tree with its topology, as it travels from prefill to decode.

    Entry i describes node i + 1; node 0 is the root (the last accepted token), which is not listed.
    `parents[i]` is a node number, so 0 means "child of the root"; parents come before their children, so
    every prefix is a valid tree. `scores` are cumulative draft log-probabilities.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.parents) == len(self.scores):
            raise InvalidRequestError("a draft tree needs as many parents and scores as tokens")
        for index, parent in enumerate(self.parents):
            if not 0 <= parent <= index:
                raise InvalidRequestError(f"draft node {index + 1} has parent {parent}, which does not come before it")

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What two workers must share to exchange KV.

    `target` holds named facts (weights, dtype, rope, …): any difference refuses the hand-off, naming the
    field. `draft` identifies the draft head, empty for none: a difference only means a cold drafter.
    """

    target: Mapping[str, str]
    draft: str = ""

    def difference(self, other: Fingerprint) -> str | None:
        """The first target field that differs, as `name: ours != theirs`, or None when KV may be shared."""
        for name in sorted({*self.target, *other.target}):
            ours, theirs = self.target.get(name, "(absent)"), other.target.get(name, "(absent)")
            if ours != theirs:
                return f"{name}: {ours} != {theirs}"
        return None


class KvPart(enum.Enum):
    """Which cache a KV frame belongs to."""

    TARGET = "target"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True)
class KvSpan:
    """A rectangle of a sequence's KV: half-open ranges of layers, KV heads and token positions.

    Its canonical bytes are, for each layer in turn, K then V, each `[token, kv_head, head_dim]` in the
    cache's dtype: that is `[layers, 2, tokens, heads, head_dim]`, contiguous. Draft rows use the same
    coordinates, row j being the token position j (docs/architecture.md, section 4).
    """

    part: KvPart
    layers: tuple[int, int]
    heads: tuple[int, int]
    tokens: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "tokens"):
            start, end = getattr(self, name)
            if not 0 <= start < end:
                raise InvalidRequestError(f"KV span: {name} {start}..{end} is not a range")

    def shape(self, head_dim: int) -> tuple[int, int, int, int, int]:
        """`[layers, 2, tokens, heads, head_dim]`."""
        sizes = {name: end - start for name, (start, end) in self._ranges().items()}
        return sizes["layers"], 2, sizes["tokens"], sizes["heads"], head_dim

    def _ranges(self) -> dict[str, tuple[int, int]]:
        return {"layers": self.layers, "heads": self.heads, "tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """How well drafting went. `accepted` counts emitted tokens that had been drafted."""

    target_forwards: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted per target forward of the decode loop: accepted plus one bonus token."""
        return (self.accepted + self.target_forwards) / self.target_forwards if self.target_forwards else 0.0

    def __add__(self, other: SpeculationStats) -> SpeculationStats:
        return SpeculationStats(
            self.target_forwards + other.target_forwards,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )
