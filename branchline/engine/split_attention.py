"""Several sequences in one forward pass, their tokens in a line: each attends to its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from branchline.engine.models.protocol import Attention


class SplitAttention:
    """Implements `protocol.Attention` over others: part i has the next `tokens[i]` tokens. Everything but attention
    looks at each token alone, so no sequence is padded to another's length."""

    def __init__(self, parts: Sequence[Attention], tokens: Sequence[int]) -> None:
        assert len(parts) == len(tokens) > 0, (len(parts), tokens)
        self._parts = tuple(parts)
        self._tokens = list(tokens)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        """See protocol.Attention."""
        assert len(query) == sum(self._tokens), (query.shape, self._tokens)
        if len(self._parts) == 1:
            return self._parts[0].attend(layer, query, key, value, window=window)
        pieces = zip(*(torch.split(tensor, self._tokens) for tensor in (query, key, value)), strict=True)
        return torch.cat(
            [part.attend(layer, *own, window=window) for part, own in zip(self._parts, pieces, strict=True)]
        )
