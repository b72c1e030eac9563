"""Attention over conversations that lie in one line, forward and backward, without a mask larger than a tile.

PyTorch's own kernels don't give the gradient of the softmax's sum, which the training-time test needs to add a few
more keys to each row (`head.py`). Conversations are computed one by one and their queries tile by tile: nothing is
padded, a tile's scores stay in a processor's cache, and the keys behind a tile's last query are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from branchline.engine.visibility import MASKED

#: Queries that are computed at once.
TILE = 128


@dataclass(frozen=True)
class Spans:
    """How many rows each conversation has: context rows, then learned rows, which see the context and one another."""

    context_lengths: tuple[int, ...]
    learned_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.context_lengths) == len(self.learned_lengths)

    @property
    def context(self) -> int:
        return sum(self.context_lengths)

    @property
    def learned(self) -> int:
        return sum(self.learned_lengths)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Each conversation's context rows and learned rows."""
        context = learned = 0
        for before, after in zip(self.context_lengths, self.learned_lengths, strict=True):
            yield slice(context, context + before), slice(learned, learned + after)
            context, learned = context + before, learned + after


def context_attention(
    query: torch.Tensor,
    context_key: torch.Tensor,
    context_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query `[learned, heads, head_dim]`; context_key, context_value `[context, kv_heads, head_dim]`; key, value
    `[learned, kv_heads, head_dim]`. A learned row sees its conversation's context and the learned rows up to itself.

    Returns what it reads, of query's shape, and the logarithm of the softmax's sum `[learned, heads]`, in float32 or
    better.
    """
    result: tuple[torch.Tensor, torch.Tensor] = _ContextAttention.apply(  # type: ignore[no-untyped-call]
        query, context_key, context_value, key, value, spans
    )
    return result


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        query, context_key, context_value, key, value, spans = args
        attended = torch.empty_like(query)
        exact = torch.promote_types(query.dtype, torch.float32)
        log_sum = torch.empty(query.shape[:2], dtype=exact, device=query.device)
        triangle = _triangle(query)
        ctx.probabilities = []
        for context, learned in spans:
            keys = _by_head(torch.cat([context_key[context], key[learned]]))
            values = _by_head(torch.cat([context_value[context], value[learned]]))
            for rows, seen in _tiles(context, learned):
                folded = _fold(query[rows], keys.shape[0])
                scores = torch.bmm(folded, keys[:, :seen].transpose(1, 2)).mul_(query.shape[2] ** -0.5)
                _mask(scores, triangle, rows.stop - rows.start)
                highest = scores.amax(-1, keepdim=True)
                scores.sub_(highest).exp_()
                sums = scores.sum(-1, keepdim=True, dtype=exact)
                scores.mul_(sums.reciprocal().to(scores.dtype))
                ctx.probabilities.append(scores)
                attended[rows] = _unfold(torch.bmm(scores, values[:, :seen]), rows.stop - rows.start)
                log_sum[rows] = _unfold(highest.to(exact) + sums.log(), rows.stop - rows.start)[..., 0]
        ctx.spans = spans
        ctx.save_for_backward(query, context_key, context_value, key, value, attended)
        return attended, log_sum

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad_attended, grad_log_sum = grads
        query, context_key, context_value, key, value, attended = ctx.saved_tensors
        results = [torch.empty_like(tensor) for tensor in (query, context_key, context_value, key, value)]
        # d score = p * (d p - sum(p * d p) + d log_sum), and the sum is that of attended * d attended.
        offset = grad_log_sum - (grad_attended * attended).sum(-1, dtype=grad_log_sum.dtype)
        offset = offset.to(query.dtype)[..., None]
        probabilities = iter(ctx.probabilities)
        for context, learned in ctx.spans:
            keys = _by_head(torch.cat([context_key[context], key[learned]]))
            values = _by_head(torch.cat([context_value[context], value[learned]]))
            grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
            for rows, seen in _tiles(context, learned):
                p, count = next(probabilities), rows.stop - rows.start
                grad = _fold(grad_attended[rows], keys.shape[0])
                grad_values[:, :seen].baddbmm_(p.transpose(1, 2), grad)
                grad_scores = torch.baddbmm(_fold(offset[rows], keys.shape[0]), grad, values[:, :seen].transpose(1, 2))
                grad_scores.mul_(p).mul_(query.shape[2] ** -0.5)
                results[0][rows] = _unfold(torch.bmm(grad_scores, keys[:, :seen]), count)
                grad_keys[:, :seen].baddbmm_(grad_scores.transpose(1, 2), _fold(query[rows], keys.shape[0]))
            before = context.stop - context.start
            for grads_by_head, of_context, of_learned in ((grad_keys, 1, 3), (grad_values, 2, 4)):
                results[of_context][context] = grads_by_head[:, :before].transpose(0, 1)
                results[of_learned][learned] = grads_by_head[:, before:].transpose(0, 1)
        return (*results, None)


class CausalAttention:
    """An `Attention` over whole sequences that lie in one line, without a cache: what `features` computes with."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self._lengths = lengths

    def attend(
        self,
        layer: int,  # noqa: ARG002  (the protocol's signature)
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        """See protocol.Attention."""
        queries, keys, values = (torch.split(tensor, list(self._lengths)) for tensor in (query, key, value))
        return torch.cat([_causal(*parts, window) for parts in zip(queries, keys, values, strict=True)])


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """One sequence, `[tokens, heads, head_dim]` each."""
    group, tokens = query.shape[1] // key.shape[1], len(query)
    mask = None
    if window is not None and window < tokens:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.repeat_interleave(group, 1).transpose(0, 1)[None],
        value.repeat_interleave(group, 1).transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
    )
    return attended[0].transpose(0, 1)


def _tiles(context: slice, learned: slice) -> Iterator[tuple[slice, int]]:
    """Each tile's queries, and how many keys of the conversation its last one sees."""
    before = context.stop - context.start
    for start in range(learned.start, learned.stop, TILE):
        stop = min(start + TILE, learned.stop)
        yield slice(start, stop), before + stop - learned.start


def _triangle(query: torch.Tensor) -> torch.Tensor:
    """What a tile's queries may not see of its own keys, `[TILE, TILE]`: added to scores."""
    hidden = torch.ones(TILE, TILE, dtype=torch.bool, device=query.device).triu(1)
    return torch.zeros(TILE, TILE, dtype=query.dtype, device=query.device).masked_fill_(hidden, MASKED)


def _mask(scores: torch.Tensor, triangle: torch.Tensor, queries: int) -> None:
    """scores `[kv_heads, group * queries, keys]`: the last keys are the queries' own rows."""
    own = scores.view(scores.shape[0], -1, queries, scores.shape[2])[..., -queries:]
    own += triangle[:queries, :queries]


def _by_head(rows: torch.Tensor) -> torch.Tensor:
    """`[rows, heads, head_dim]` -> `[heads, rows, head_dim]`, contiguous for the products."""
    return rows.transpose(0, 1).contiguous()


def _fold(rows: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[queries, heads, n]` -> `[kv_heads, group * queries, n]`: the query heads of a KV head in one product."""
    queries, heads, width = rows.shape
    by_group = rows.view(queries, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3)
    return by_group.reshape(kv_heads, -1, width)


def _unfold(folded: torch.Tensor, queries: int) -> torch.Tensor:
    """The inverse of `_fold`."""
    kv_heads, _, width = folded.shape
    return folded.view(kv_heads, -1, queries, width).permute(2, 0, 1, 3).reshape(queries, -1, width)
