"""One request on its way through prefill."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from branchline.core import FinishReason, Request, TokenLogprobs


@dataclass(eq=False)
class PrefillTask:
    """One request in prefill, in one or several samples. `computed` tokens of the context have their target KV in the
    cache, `cached` of them without having been computed for it; `first_tokens` are the samples' so far."""

    request: Request
    samples: int
    blocks: list[int]
    block_table: torch.Tensor  # int64 [1, blocks]
    token_ids: torch.Tensor  # int64 [context]
    keys: tuple[bytes, ...]  # of the context's whole blocks, see prefix_cache; none when nothing is cached
    computed: int = 0
    cached: int = 0
    #: State of the last computed position: the target's hidden state, and the fused one for the draft head.
    last_hidden: torch.Tensor | None = field(default=None, repr=False)
    last_fused: torch.Tensor | None = field(default=None, repr=False)
    first_tokens: dict[int, int] = field(default_factory=dict)
    released: bool = False
    _reported: int = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def left(self) -> int:
        """Tokens of the context that are to be computed, as far as known now."""
        return self.length - self.computed

    @property
    def done(self) -> bool:
        return self.computed == self.length

    def report(self) -> tuple[int, int] | None:
        """The token range whose target KV is complete and was not reported before, found or computed."""
        if self._reported == self.computed:
            return None
        start, self._reported = self._reported, self.computed
        return start, self.computed


@dataclass(frozen=True)
class FirstChoice:
    """A sample's first token; `finish` is set when it ends the request, `logprobs` if the request asked for them."""

    token_id: int
    finish: FinishReason | None
    logprobs: TokenLogprobs | None
