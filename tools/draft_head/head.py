"""The draft head as it is trained: the same computation as `branchline.engine.models.eagle3`, unrolled for the
training-time test of EAGLE-3 (Li et al. 2025, arXiv 2503.01840) and differentiable.

Step 0 is what the engine computes for verified tokens; step k > 0 is what it computes for the k-th drafted token. A
row of step k takes the token that follows the row's token of step k - 1, and the state that step k - 1 gave for that
row. It sees the keys of step 0 up to its own row, as the cache has them, and its own rows of the steps 1 … k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from branchline.engine.models.reference_config import DecoderConfig
from branchline.engine.models.reference_layers import RotaryTable
from tools.draft_head.causal import Spans, context_attention


@dataclass(frozen=True)
class Rows:
    """The rows of several conversations, those that only serve as context first: `[context + learned]`.

    A conversation's row i takes token i + 1 and the auxiliary states at i, and predicts token i + 2. Rows whose token
    is part of the answer are learned; those before are context, of which only keys and values matter. Both kinds are
    in a line, conversation by conversation, so that step k's tokens are those of step 0, k places on.
    """

    #: int64 `[context + learned + steps]`: the token of each row, and something to read beyond the last.
    tokens: torch.Tensor
    #: `[context + learned, 3 * hidden_size]`
    auxiliary: torch.Tensor
    #: int64 `[context + learned]`
    positions: torch.Tensor
    #: Where each conversation's rows are.
    spans: Spans


class DraftHead(nn.Module):
    """Its parameters have the names of SafeAILab's checkpoints. `forward` is `unroll`."""

    def __init__(self, config: DecoderConfig, draft_vocab: int, rotary_positions: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, draft_vocab, bias=False)
        self._rotary_positions = rotary_positions
        self._rotary: dict[tuple[torch.device, torch.dtype], RotaryTable] = {}

    def forward(self, rows: Rows, embedding: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
        """Yields the states that `lm_head` reads, `[learned, hidden_size]`, of each step. All products are computed in
        the dtype of `embedding`, `[vocab_size, hidden_size]`, whatever the parameters' own."""
        config, weights = self.config, _Weights.of(self, embedding.dtype)
        context, learned = rows.spans.context, rows.spans.learned
        rotary = self._rotary_table(embedding)
        embedded = weights.normed(F.embedding(rows.tokens, embedding), weights.embedding_norm)
        # The projection of a sum of two inputs is the sum of the projections: the tokens' part, shifted, serves every
        # step. Of context rows only keys and values are needed.
        queries = config.qkv_sizes[0]
        context_tokens = F.linear(embedded[:context], weights.qkv_embedding[queries:])
        learned_tokens = F.linear(embedded[context:], weights.qkv_embedding)

        fused = F.linear(rows.auxiliary, weights.fc)
        normed = weights.normed(fused[:context], weights.hidden_norm)
        context_kv = context_tokens + F.linear(normed, weights.qkv_hidden[queries:])
        context_key, context_value = self._heads(context_kv).chunk(2, 1)
        context_key = rotary(rows.positions[:context])(context_key)

        hidden = fused[context:]
        ancestors: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(steps):
            normed = weights.normed(hidden, weights.hidden_norm)
            qkv = learned_tokens[step : step + learned] + F.linear(normed, weights.qkv_hidden)
            turned, value = torch.split(
                self._heads(qkv), [config.num_heads + config.num_kv_heads, config.num_kv_heads], 1
            )
            turned = rotary(rows.positions[context:] + step)(turned)
            query, key = torch.split(turned, [config.num_heads, config.num_kv_heads], 1)
            if step == 0:
                base = (context_key, context_value, key, value)
            else:
                ancestors.append((key, value))
            attended = with_ancestors(query, *context_attention(query, *base, rows.spans), ancestors)
            hidden = hidden + F.linear(attended.flatten(1), weights.output)
            inner = weights.normed(hidden, weights.post_attention_norm)
            gate, up = F.linear(inner, weights.gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, weights.down)
            yield weights.normed(hidden, weights.norm)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1] // self.config.head_dim, self.config.head_dim)  # of no rows, too

    def _rotary_table(self, like: torch.Tensor) -> RotaryTable:
        key = like.device, like.dtype
        if key not in self._rotary:
            self._rotary[key] = RotaryTable(self.config.rope, self.config.head_dim, self._rotary_positions, *key)
        return self._rotary[key]


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        query, key, value = config.qkv_sizes
        self.hidden_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(2 * hidden, query, bias=False),
                "k_proj": nn.Linear(2 * hidden, key, bias=False),
                "v_proj": nn.Linear(2 * hidden, value, bias=False),
                "o_proj": nn.Linear(query, hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, inner, bias=False),
                "up_proj": nn.Linear(hidden, inner, bias=False),
                "down_proj": nn.Linear(inner, hidden, bias=False),
            }
        )


@dataclass(frozen=True)
class _Weights:
    """The parameters as the products read them: merged, and in the products' dtype. Gradients flow back through it."""

    fc: torch.Tensor
    #: The halves of the merged query, key and value projection that read the token and the state.
    qkv_embedding: torch.Tensor
    qkv_hidden: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    embedding_norm: torch.Tensor
    hidden_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    norm: torch.Tensor
    eps: float

    @classmethod
    def of(cls, head: DraftHead, dtype: torch.dtype) -> _Weights:
        layer = head.midlayer

        def merged(module: nn.ModuleDict, *names: str) -> torch.Tensor:
            return torch.cat(tuple(module[name].get_parameter("weight") for name in names)).to(dtype)

        qkv = merged(layer.self_attn, "q_proj", "k_proj", "v_proj")
        hidden = head.config.hidden_size
        return cls(
            fc=head.fc.weight.to(dtype),
            qkv_embedding=qkv[:, :hidden],
            qkv_hidden=qkv[:, hidden:],
            output=merged(layer.self_attn, "o_proj"),
            gate_up=merged(layer.mlp, "gate_proj", "up_proj"),
            down=merged(layer.mlp, "down_proj"),
            embedding_norm=layer.input_layernorm.weight.to(dtype),
            hidden_norm=layer.hidden_norm.weight.to(dtype),
            post_attention_norm=layer.post_attention_layernorm.weight.to(dtype),
            norm=head.norm.weight.to(dtype),
            eps=head.config.rms_norm_eps,
        )

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


def with_ancestors(
    query: torch.Tensor,
    attended: torch.Tensor,
    log_sum: torch.Tensor,
    ancestors: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Attention over the context, `[learned, heads, head_dim]` with the logarithm of its softmax's sum `[learned,
    heads]`, joined by each row's ancestors, of which it sees its own alone: as many scores as there are rows."""
    if not ancestors:
        return attended
    learned, head_dim = query.shape[0], query.shape[2]
    # [learned, ancestors, kv_heads, head_dim]
    keys, values = (torch.stack(part, 1) for part in zip(*ancestors, strict=True))
    grouped = query.view(learned, keys.shape[2], -1, head_dim)
    scores = torch.einsum("rkgd,rakd->rkga", grouped, keys).flatten(1, 2).to(log_sum.dtype) * head_dim**-0.5
    shares = torch.softmax(torch.cat([log_sum[..., None], scores], -1), -1).to(query.dtype)
    by_kv = shares[..., 1:].view(learned, keys.shape[2], -1, keys.shape[1])
    drafted = torch.einsum("rkga,rakd->rkgd", by_kv, values)
    return attended * shares[..., :1] + drafted.reshape(query.shape)
