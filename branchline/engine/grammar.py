"""Grammars: what the host forbids at each node of a tree, while the target's forward pass over that tree runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch


class Grammar(Protocol):
    """Which tokens may come next in one request's output. Owned by the engine's thread, as the request is."""

    def allowed(self, path: Sequence[int]) -> torch.Tensor | None:
        """bool `[vocab]` on the host: what may follow the output so far and then `path`. None when the path itself is
        not allowed. Must allow at least one token."""
        ...

    def advance(self, token_ids: Sequence[int]) -> None:
        """These tokens, which were allowed, have joined the output."""
        ...


def node_masks(
    grammars: Mapping[int, Grammar], tokens: torch.Tensor, parents: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """bool `[batch, nodes, vocab]` on the host: which tokens may be chosen at each node.

    grammars by row of the batch; tokens, parents int64 `[batch, nodes]` on the host, the root's included (its token is
    in the output already), parents -1 for the root and absent nodes. Rows without a grammar, and nodes that no allowed
    path reaches, are left free.
    """
    masks = torch.ones((*tokens.shape, vocab_size), dtype=torch.bool)
    for row, grammar in grammars.items():
        reached: dict[int, tuple[int, ...]] = {0: ()}
        for node, (token, parent) in enumerate(zip(tokens[row].tolist(), parents[row].tolist(), strict=True)):
            if node > 0:
                if parent not in reached:
                    continue
                reached[node] = (*reached[parent], token)
            allowed = grammar.allowed(reached[node])
            if allowed is None:
                del reached[node]
            else:
                masks[row, node] = allowed
    return masks
