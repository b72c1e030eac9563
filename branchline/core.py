"""Values that both sides of the wire share. Standard library only.

Everything here is immutable: a request, a sampling rule, a draft tree, a KV frame. The wire layer turns
them into messages and back (`branchline.wire.convert`); the engine turns them into tensors.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

#: What one request may name at most: the decode step has fixed shapes.
MAX_STOP_TOKEN_IDS = 8
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 300
MAX_BAD_WORDS = 32
MAX_BAD_WORD_TOKENS = 8
MAX_SAMPLES = 16
#: A request of priority p is served like one of priority 0 that came p * PRIORITY_S seconds earlier.
MAX_PRIORITY = 100
PRIORITY_S = 10.0


def rank_of(now: float, queued_s: float, priority: int) -> float:
    """The rank, in seconds of the clock that gave `now`, of a request that has waited `queued_s` elsewhere: a virtual
    arrival time, earlier by `PRIORITY_S` for each level of priority. The smallest is served first."""
    return now - queued_s - priority * PRIORITY_S


class InvalidRequestError(ValueError):
    """A request that can never succeed; the message is meant for the client. Maps to INVALID_ARGUMENT."""


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the model's context limit


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN, too
        raise InvalidRequestError(f"{name} must be between {low:g} and {high:g}, got {value}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the target's logits; the defaults choose greedily and change nothing.

    The logits are edited first (`logit_bias`, `bad_words`, the request's `min_tokens`, the penalties), then divided by
    `temperature` (0 is greedy), then filtered: `min_p` keeps tokens at least that likely relative to the likeliest,
    `top_k` and `top_p` cut what is left (0 and 1 are off). The same `seed` and `sample_index` give the same tokens with
    any tree, in any batch and after a failover (docs/architecture.md, section 5).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    #: Divides positive, multiplies negative logits of tokens in prompt and output; 1 is off (Keskar et al. 2019).
    repetition_penalty: float = 1.0
    #: Subtracted from the logits of tokens in the output: once, and once per occurrence.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: (token id, what is added to its logit), each id once.
    logit_bias: tuple[tuple[int, float], ...] = ()
    #: Token sequences that the output never contains. (The same text may still be spelled by other tokens.)
    bad_words: tuple[tuple[int, ...], ...] = ()
    #: Tells the samples of one request apart in the noise.
    sample_index: int = 0

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise InvalidRequestError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 <= self.seed < 2**63:
            raise InvalidRequestError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if not (math.isfinite(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 100.0):
            raise InvalidRequestError(
                f"repetition_penalty must be above 0 and at most 100, got {self.repetition_penalty}"
            )
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("sample_index", self.sample_index, 0, MAX_SAMPLES - 1)
        self._check_lists()

    def _check_lists(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequestError(f"logit_bias may name {MAX_LOGIT_BIASES} tokens, got {len(self.logit_bias)}")
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidRequestError("logit_bias names a token twice")
        for token_id, bias in self.logit_bias:
            _check_range(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequestError(f"bad_words may have {MAX_BAD_WORDS} token sequences, got {len(self.bad_words)}")
        for word in self.bad_words:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise InvalidRequestError(f"bad_words: {len(word)} tokens are not between 1 and {MAX_BAD_WORD_TOKENS}")

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
    #: Output tokens before which no stop token id is chosen.
    min_tokens: int = 0
    #: Most likely tokens to report with each token beside its own log-probability; None reports nothing.
    logprobs: int | None = None
    #: The most draft nodes a step may verify for it; 0 is plain decoding, None leaves it to the worker.
    draft_nodes: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequestError("the prompt is empty")
        if self.max_tokens < 1:
            raise InvalidRequestError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if len(self.emitted) >= self.max_tokens:
            raise InvalidRequestError(f"all {self.max_tokens} tokens are emitted already")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(f"at most {MAX_STOP_TOKEN_IDS} stop token ids, got {len(self.stop_token_ids)}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.draft_nodes is not None and self.draft_nodes < 0:
            raise InvalidRequestError(f"draft_nodes must not be negative, got {self.draft_nodes}")

    @property
    def context(self) -> tuple[int, ...]:
        """All token ids that the next token follows: the prompt, then what was emitted."""
        return self.prompt + self.emitted

    @property
    def max_length(self) -> int:
        """The most tokens the sequence can reach, prompt included."""
        return len(self.prompt) + self.max_tokens

    def finish_after(self, token_id: int) -> FinishReason | None:
        """Whether the next token, being `token_id`, ends the request; the model's context limit aside."""
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.emitted) + 1 == self.max_tokens else None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The model's own log-probabilities where a token was chosen, before any edit, temperature or filter: the
    token's, and the likeliest ones' as (token id, log-probability), falling."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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

    def cut(self, nodes: int, depth: int) -> DraftTree:
        """The first `nodes` nodes of those that are at most `depth` levels below the root."""
        kept, depths = {0: 0}, [0]  # node number here -> there; depth by number here
        entries: list[tuple[int, int, float]] = []
        for number, (token, parent, score) in enumerate(zip(self.tokens, self.parents, self.scores, strict=True), 1):
            depths.append(depths[parent] + 1)
            if depths[number] <= depth and len(entries) < nodes:
                entries.append((token, kept[parent], score))
                kept[number] = len(entries)
        return DraftTree(*(tuple(column) for column in zip(*entries, strict=True))) if entries else DraftTree()


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
