"""Models of a given shape with random weights, made in memory, and acceptance of a given length.

For speed alone: what such a model says means nothing, and how long it takes doesn't depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from branchline.core import Fingerprint
from branchline.engine.models.eagle3 import build_eagle3
from branchline.engine.models.eagle3_config import Eagle3Config
from branchline.engine.models.protocol import Attention, DraftModel, Models, TargetModel, TargetOutput
from branchline.engine.models.reference import build_target
from branchline.engine.models.reference_config import DecoderConfig, RopeConfig

_LLAMA_3_1_8B = DecoderConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position=131072,
    rms_norm_eps=1e-5,
    rope=RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192),
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    tied_embeddings=False,
)

#: Target shapes by name; `tiny` is for trying the benchmark itself out.
SHAPES = {
    "llama-3.1-8b": _LLAMA_3_1_8B,
    "tiny": dataclasses.replace(
        _LLAMA_3_1_8B,
        hidden_size=64,
        intermediate_size=96,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=512,
        max_position=4096,
    ),
}
#: Entries of the draft head's vocabulary, as published heads for Llama 3.1 have them.
DRAFT_VOCAB = 32000

#: What a forced target chooses: the token that a forced head always guesses first, and one that it never guesses.
GUESSED, UNGUESSED = 1, 2
_CERTAIN = 1e4


class RandomTensors:
    """A `TensorSource` that makes every tensor up, on the device: normal, scaled by the inputs; norms are ones."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return name == "midlayer.hidden_norm.weight"

    def take(self, name: str, shape: Iterable[int]) -> torch.Tensor:  # noqa: ARG002  (the source's signature)
        size = list(shape)
        tensor = torch.ones(size, device=self._device, dtype=self._dtype)
        return tensor if len(size) == 1 else tensor.normal_(0.0, size[-1] ** -0.5, generator=self._generator)

    def rows(self, name: str) -> int:
        raise NotImplementedError(name)  # asked for tensors that are there alone


def random_models(name: str, device: torch.device, dtype: torch.dtype, acceptance: int) -> Models:
    """A target of the shape `name` and an EAGLE-3 head for it; with a tree of depth D ≥ acceptance - 1 every iteration
    emits `acceptance` tokens, its first ones apart."""
    decoder = SHAPES[name]
    tensors = RandomTensors(device, dtype)
    layers = (2, decoder.num_layers // 2, decoder.num_layers - 3)
    target = build_target(decoder, tensors, (), device, dtype, layers)
    head = Eagle3Config(
        decoder=dataclasses.replace(decoder, num_layers=1),
        draft_vocab_size=min(DRAFT_VOCAB, decoder.vocab_size),
        target_hidden_size=decoder.hidden_size,
        auxiliary_layers=layers,
        norm_before_residual=False,
        norm_before_fc=False,
        fc_norm=False,
        norm_output=False,
    )
    draft = build_eagle3(head, tensors, target.spec, target.embedding, device, dtype)
    fingerprint = Fingerprint({"shape": name})
    return Models(name, ForcedTarget(target, acceptance), ForcedDraft(draft), fingerprint, device, dtype)


class ForcedTarget:
    """A target that computes everything and then chooses GUESSED, but UNGUESSED where a run of `acceptance` tokens is
    to end: behind every position that leaves acceptance - 1 when divided by it. So an iteration whose root stands at a
    multiple of `acceptance` accepts acceptance - 1 drafted tokens and a bonus, and the next root does too; one whose
    root stands elsewhere gets there. No host read, no other shapes: it can be captured like any target.
    """

    def __init__(self, target: TargetModel, acceptance: int) -> None:
        assert acceptance >= 1, acceptance
        self.spec = target.spec
        self.inner = target
        self._acceptance = acceptance
        self._positions = torch.empty(0, dtype=torch.int64)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> TargetOutput:
        self._positions = positions
        return self.inner.forward(token_ids, positions, attention)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert len(hidden) == len(self._positions), "logits of other rows than the last forward's"
        ends = self._positions.remainder(self._acceptance) == self._acceptance - 1
        chosen = torch.where(ends, UNGUESSED, GUESSED)
        return self.inner.logits(hidden).scatter_(1, chosen[:, None], _CERTAIN)


class ForcedDraft:
    """A draft head that computes everything and then guesses GUESSED first and UNGUESSED never. Its vocabulary's
    entries are the target's first tokens."""

    def __init__(self, draft: DraftModel) -> None:
        self.spec = draft.spec
        self.target_token_ids = draft.target_token_ids
        self.inner = draft

    def fuse(self, auxiliary: torch.Tensor) -> torch.Tensor:
        return self.inner.fuse(auxiliary)

    def forward(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.forward(token_ids, hidden, positions, attention)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        logits = self.inner.logits(normed)
        logits[:, GUESSED], logits[:, UNGUESSED] = _CERTAIN, -_CERTAIN
        return logits
