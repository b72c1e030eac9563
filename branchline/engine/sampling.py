"""Choosing tokens from logits, the same way wherever a token is chosen.

A token is the argmax over the edited logits (`logit_edits`); or, with a temperature above 0, over those divided by it,
filtered (`filters`), plus Gumbel noise (`noise`), which draws from exactly their distribution (Gumbel 1954; Maddison et
al. 2014). All of it depends on the sequence alone, bit for bit: not on the batch, the tree, or which worker computes
it. See docs/architecture.md, section 5.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from branchline.core import MAX_LOGPROBS, Request, SamplingParams
from branchline.engine.filters import Filter, outside_filters
from branchline.engine.logit_edits import EditTensors, needs_edits
from branchline.engine.noise import gumbel_noise, noise_key

#: Part of the target's fingerprint: workers that choose tokens differently must not share a request. Raise it when the
#: same logits, request and position would give another token.
SAMPLER_VERSION = "2"

#: Below it a temperature is as good as greedy, and dividing by it could overflow.
_LOWEST_TEMPERATURE = 1e-6
#: Taken from the scores of filtered tokens: more than any two finite scores differ by.
_FAR = 1e30


@dataclass(frozen=True)
class SamplingVariant:
    """What a batch needs; a host-side constant, so that a batch pays only for that."""

    noise: bool = False
    filters: Filter = Filter.NONE
    edits: bool = False
    logprobs: bool = False

    @classmethod
    def of(cls, requests: Iterable[Request]) -> SamplingVariant:
        """The cheapest variant that serves all of them."""
        requests = list(requests)
        drawn = [request.sampling for request in requests if not request.sampling.greedy]
        return cls(
            noise=bool(drawn),
            filters=functools.reduce(operator.or_, map(_filters_of, drawn), Filter.NONE),
            edits=any(needs_edits(request) for request in requests),
            logprobs=any(request.logprobs is not None for request in requests),
        )


def _filters_of(params: SamplingParams) -> Filter:
    used = {Filter.MIN_P: params.min_p > 0.0, Filter.TOP_K: params.top_k > 0, Filter.TOP_P: params.top_p < 1.0}
    return functools.reduce(operator.or_, (kind for kind, on in used.items() if on), Filter.NONE)


@dataclass
class SamplingTensors:
    """Per-request settings and progress on the device, `[rows]` each. Greedy rows hold what leaves logits unchanged."""

    key: torch.Tensor  # int64: `noise_key` of the seed and the sample index
    temperature: torch.Tensor  # float32, above 0; 1 for greedy
    noise_scale: torch.Tensor  # float32: 1, or 0 for greedy
    min_p_reach: torch.Tensor  # float32: -log(min_p)
    top_k: torch.Tensor  # int64, 1 to vocab
    top_p: torch.Tensor  # float64
    edits: EditTensors | None  # None in a selection for a variant without edits

    @classmethod
    def empty(cls, rows: int, vocab_size: int, device: torch.device) -> SamplingTensors:
        """Greedy rows without edits."""

        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        return cls(
            key=full(0, torch.int64),
            temperature=full(1.0, torch.float32),
            noise_scale=full(0.0, torch.float32),
            min_p_reach=full(math.inf, torch.float32),
            top_k=full(vocab_size, torch.int64),
            top_p=full(1.0, torch.float64),
            edits=EditTensors.empty(rows, vocab_size, device),
        )

    def load(self, row: int, request: Request, first_token: int | None) -> None:
        """Fills a row from the host. `first_token`, chosen by prefill, counts as emitted after `request.emitted`.

        Raises InvalidRequestError when the edits name a token id outside the vocabulary.
        """
        assert self.edits is not None
        self.edits.load(row, request, first_token)
        vocab_size = self.edits.in_prompt.shape[1]
        params, greedy = request.sampling, request.sampling.greedy
        self.key[row] = noise_key(params.seed, params.sample_index)
        self.temperature[row] = 1.0 if greedy else max(params.temperature, _LOWEST_TEMPERATURE)
        self.noise_scale[row] = 0.0 if greedy else 1.0
        self.min_p_reach[row] = math.inf if greedy or params.min_p == 0.0 else abs(math.log(params.min_p))
        self.top_k[row] = vocab_size if greedy or params.top_k == 0 else min(params.top_k, vocab_size)
        self.top_p[row] = 1.0 if greedy else params.top_p

    def select(self, index: torch.Tensor, variant: SamplingVariant) -> SamplingTensors:
        """Copies of rows (index int64 `[batch]`); what is as wide as the vocabulary only for a variant with edits."""
        assert self.edits is not None
        return SamplingTensors(
            key=self.key.index_select(0, index),
            temperature=self.temperature.index_select(0, index),
            noise_scale=self.noise_scale.index_select(0, index),
            min_p_reach=self.min_p_reach.index_select(0, index),
            top_k=self.top_k.index_select(0, index),
            top_p=self.top_p.index_select(0, index),
            edits=self.edits.select(index) if variant.edits else None,
        )

    def advance(self, token_ids: torch.Tensor, keep: torch.Tensor) -> None:
        """A token (int64 `[rows]`) joins the output of each row where `keep` (bool `[rows]`); in place."""
        if self.edits is not None:
            self.edits.advance(token_ids, keep)

    def store(self, index: torch.Tensor, rows: SamplingTensors) -> None:
        """Writes a selection's progress back. `index` may repeat only rows that did not advance, as padding."""
        if rows.edits is not None:
            assert self.edits is not None
            self.edits.store(index, rows.edits)


def choose_token(
    logits: torch.Tensor, position: torch.Tensor, rows: SamplingTensors, variant: SamplingVariant
) -> torch.Tensor:
    """The target's own next token: logits `[batch, vocab]` of any float dtype -> int64 `[batch]`.

    position int64 `[batch]`: the absolute position of the token to be chosen. Of equal scores the first wins.
    """
    if variant.edits:
        assert rows.edits is not None
        logits = rows.edits.apply(logits)
    if not variant.noise:
        return _first_largest(logits)
    scaled = logits.float() / rows.temperature[:, None]
    token_ids = torch.arange(logits.shape[-1], device=logits.device)
    noise = gumbel_noise(rows.key, position[:, None], token_ids)[:, 0]
    scores = noise.mul_(rows.noise_scale[:, None]).add_(scaled)
    if variant.filters:
        outside = outside_filters(scaled, rows.min_p_reach, rows.top_k, rows.top_p, variant.filters)
        scores = scores.sub_(outside, alpha=_FAR)
    return _first_largest(scores)


def _first_largest(values: torch.Tensor) -> torch.Tensor:
    """argmax over the last dimension; of equal values the first. `max` is four times as fast in bfloat16 on a CPU."""
    return values.max(-1).indices


def draft_scores(
    logits: torch.Tensor,
    positions: torch.Tensor,
    target_token_ids: torch.Tensor,
    rows: SamplingTensors,
    variant: SamplingVariant,
) -> torch.Tensor:
    """What the draft head ranks children by, and adds up along paths: normalised log-scores, float32 `[batch, n,
    draft_vocab]`.

    logits float32 `[batch, n, draft_vocab]`; positions int64 `[batch, n]` of the tokens to be guessed; target_token_ids
    int64 `[draft_vocab]`. For greedy rows these are log-probabilities. For others the logits are divided by the
    temperature and given the noise that will choose the target's token: that raises the chance that it is among the
    guesses.
    """
    if variant.noise:
        noise = gumbel_noise(rows.key, positions, target_token_ids)
        scaled = logits / rows.temperature[:, None, None]
        logits = noise.mul_(rows.noise_scale[:, None, None]).add_(scaled)
    return torch.log_softmax(logits, -1)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the raw logits `[batch, n, vocab]`, before edits, temperature and filters.

    token_ids int64 `[batch, n]`. Returns the tokens' own, float32 `[batch, n]`; and the likeliest tokens, falling:
    ids int64 and log-probabilities float32 `[batch, n, MAX_LOGPROBS]`. A smaller vocabulary is filled up with token 0
    at -inf.
    """
    everything = torch.log_softmax(logits, -1, dtype=torch.float32)
    own = everything.gather(2, token_ids[:, :, None])[:, :, 0]
    top = everything.topk(min(MAX_LOGPROBS, logits.shape[-1]), -1)
    missing = (0, MAX_LOGPROBS - top.values.shape[-1])
    return (
        own,
        torch.nn.functional.pad(top.indices, missing),
        torch.nn.functional.pad(top.values, missing, value=float("-inf")),
    )
