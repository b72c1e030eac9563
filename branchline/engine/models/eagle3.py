"""The EAGLE-3 draft head (Li et al. 2025, arXiv 2503.01840) in plain PyTorch.

One Llama layer that reads two things side by side: the embedding of token j and the fused hidden state of
position j - 1. It serves both providers: of the target it needs only the sizes and, where the checkpoint brings
none of its own, the embedding matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from branchline.engine.models.checkpoint import TensorSource, Weights
from branchline.engine.models.eagle3_config import NUM_AUXILIARY, Eagle3Config, read_eagle3_config
from branchline.engine.models.linear import Linear
from branchline.engine.models.protocol import Attention, DraftSpec, KvGeometry, ModelError, TargetSpec
from branchline.engine.models.reference_layers import LayerLoader, RmsNorm, RotaryTable, SelfAttention, SwiGlu


@dataclass(eq=False)
class Eagle3Head:
    """A DraftModel. The fields from `embedding` on are its tensors, on one device and in one dtype."""

    spec: DraftSpec
    target_token_ids: torch.Tensor
    config: Eagle3Config
    embedding: torch.Tensor
    #: Norms over equal parts of the auxiliary states, in order: none, one over all, or one for each of three.
    fuse_norms: Sequence[RmsNorm]
    fc: Linear
    embedding_norm: RmsNorm
    hidden_norm: RmsNorm
    attention: SelfAttention
    post_attention_norm: RmsNorm
    mlp: SwiGlu
    norm: RmsNorm
    head: Linear
    rotary: RotaryTable

    def fuse(self, auxiliary: torch.Tensor) -> torch.Tensor:
        """See DraftModel.fuse."""
        if self.fuse_norms:
            parts = auxiliary.chunk(len(self.fuse_norms), -1)
            auxiliary = torch.cat([norm(part) for norm, part in zip(self.fuse_norms, parts, strict=True)], -1)
        return self.fc(auxiliary)

    def forward(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See DraftModel.forward."""
        embedded = self.embedding_norm(F.embedding(token_ids, self.embedding))
        normed = self.hidden_norm(hidden)
        residual = normed if self.config.norm_before_residual else hidden
        attended = self.attention(0, torch.cat([embedded, normed], -1), self.rotary(positions), attention)
        residual = residual + attended
        recurrent = residual + self.mlp(self.post_attention_norm(residual))
        output = self.norm(recurrent)
        return output, output if self.config.norm_output else recurrent

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden_size]` -> `[tokens, draft_vocab_size]`."""
        return self.head(normed)


def load_eagle3(
    directory: Path, target: TargetSpec, target_embedding: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> Eagle3Head:
    """Loads a head for a target whose embedding is `[≥ vocab_size, hidden_size]` on `device` in `dtype`.

    Raises ModelError when the head doesn't fit the target or lacks a tensor.
    """
    config = read_eagle3_config(directory)
    check_fits(config, target)
    weights = Weights(directory)
    head = build_eagle3(config, weights, target, target_embedding, device, dtype)
    weights.ignore("t2d", "verifier_lm_head.weight", "verifier_norm.weight")
    weights.check_all_taken()
    return head


def build_eagle3(
    config: Eagle3Config,
    weights: TensorSource,
    target: TargetSpec,
    target_embedding: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Eagle3Head:
    """Builds a head from a source of tensors in the public names. Raises ModelError for a wrong vocabulary."""
    decoder = config.decoder
    layer = "midlayer" if "midlayer.hidden_norm.weight" in weights else "layers.0"
    loader = LayerLoader(weights, decoder, device, dtype)
    return Eagle3Head(
        spec=DraftSpec(
            kv=KvGeometry(1, decoder.num_kv_heads, decoder.head_dim, dtype),
            hidden_size=decoder.hidden_size,
            draft_vocab_size=config.draft_vocab_size,
        ),
        target_token_ids=_target_token_ids(weights, config, target.vocab_size).to(device),
        config=config,
        embedding=_own_embedding(loader, target.vocab_size) if "embed_tokens.weight" in weights else target_embedding,
        fuse_norms=_fuse_norms(loader, config),
        fc=loader.linear(NUM_AUXILIARY * target.hidden_size, {"fc": decoder.hidden_size}),
        embedding_norm=loader.norm(f"{layer}.input_layernorm"),
        hidden_norm=loader.norm(f"{layer}.hidden_norm"),
        attention=loader.attention(f"{layer}.self_attn", 2 * decoder.hidden_size),
        post_attention_norm=loader.norm(f"{layer}.post_attention_layernorm"),
        mlp=loader.mlp(f"{layer}.mlp"),
        norm=loader.norm("norm"),
        head=loader.linear(decoder.hidden_size, {"lm_head": config.draft_vocab_size}),
        # The target's limit: the head is asked for every position that the target is.
        rotary=RotaryTable(decoder.rope, decoder.head_dim, target.max_position, device, dtype),
    )


def check_fits(config: Eagle3Config, target: TargetSpec) -> None:
    """Raises ModelError naming both sizes when the head was made for another target."""
    for size in (config.decoder.hidden_size, config.target_hidden_size):
        if size != target.hidden_size:
            raise ModelError(f"the draft head's hidden size {size} differs from the model's {target.hidden_size}")
    if config.draft_vocab_size > target.vocab_size:
        raise ModelError(
            f"the draft head's vocabulary of {config.draft_vocab_size} exceeds the model's {target.vocab_size}"
        )
    config.layers_to_fuse(target.kv.num_layers)


def _target_token_ids(weights: TensorSource, config: Eagle3Config, vocab_size: int) -> torch.Tensor:
    """int64 `[draft_vocab_size]`. The checkpoint stores offsets: draft entry i is the target's token i + d2t[i]."""
    ids = torch.arange(config.draft_vocab_size)
    if "d2t" in weights:
        ids = ids + weights.take("d2t", (config.draft_vocab_size,)).to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ModelError(
            f"the draft head's vocabulary maps to token ids {low} to {high}, the model's vocabulary has {vocab_size}"
        )
    return ids


def _own_embedding(loader: LayerLoader, vocab_size: int) -> torch.Tensor:
    name = "embed_tokens.weight"
    rows = loader.weights.rows(name)
    if rows < vocab_size:
        raise ModelError(f"the draft head embeds {rows} tokens, the model's vocabulary has {vocab_size}")
    return loader.tensor(name, rows, loader.config.hidden_size)


def _fuse_norms(loader: LayerLoader, config: Eagle3Config) -> list[RmsNorm]:
    if config.norm_before_fc and config.fc_norm:
        raise ModelError("a draft head with both norm_before_fc and fc_norm is not supported")
    if config.norm_before_fc:
        return [loader.norm("input_norm", NUM_AUXILIARY * config.target_hidden_size)]
    if config.fc_norm:
        return [loader.norm(f"fc_norm.{index}", config.target_hidden_size) for index in range(NUM_AUXILIARY)]
    return []
