"""Who sees whom in one forward pass over the paged cache.

Three passes are the same picture: a prompt's chunk, a draft tree, a drafting level. A sequence has a context, the rows
`start … base - 1` of the cache, seen by every query; behind it lie new rows at `base`, `base + 1`, …, each seen only by
the queries that descend from it. For a chunk of a prompt that relation is a triangle; for a tree it is
ancestor-or-self. A layer with a sliding window cuts both by position: row r of the context has position r, a new row
has `base` plus its depth, and a query at position p sees the positions above p - window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Added to the scores of rows that a query may not see. Finite: a padded query that sees nothing stays finite too,
#: so that nothing it writes to the null block can spoil a neighbour's sum (0 * NaN is NaN).
MASKED = -1e30


@dataclass(frozen=True)
class Visibility:
    """base, start int64 `[batch]`; ancestors bool `[batch or 1, queries, new]`; depths int64 `[batch or 1, new]` of the
    new rows; query_depths int64 `[batch or 1, queries]`."""

    base: torch.Tensor
    start: torch.Tensor
    ancestors: torch.Tensor
    depths: torch.Tensor
    query_depths: torch.Tensor

    @classmethod
    def of(
        cls,
        base: torch.Tensor,
        start: torch.Tensor,
        ancestors: torch.Tensor,
        offsets: torch.Tensor,
        depths: torch.Tensor | None,
    ) -> Visibility:
        """For queries whose own rows are the new rows `offsets`, int64 `[batch or 1, queries]`. Without `depths` the
        new rows are a line: each one's depth is its offset."""
        if depths is None:
            depths = torch.arange(ancestors.shape[2], device=base.device)[None]
        batch = max(depths.shape[0], offsets.shape[0])
        query_depths = depths.expand(batch, -1).gather(1, offsets.expand(batch, -1))
        return cls(base, start, ancestors, depths, query_depths)

    @property
    def batch(self) -> int:
        return self.base.shape[0]

    @property
    def queries(self) -> int:
        return self.ancestors.shape[1]

    @property
    def new(self) -> int:
        return self.ancestors.shape[2]

    def bias(self, rows: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The additive mask over the first `rows` rows of each sequence, `[batch, queries, rows]`: 0 or MASKED.

        Rows that are neither context nor new, those of the block table's last part, are masked.
        """
        row = torch.arange(rows, device=self.base.device)
        offset = row - self.base[:, None]
        context = ((offset < 0) & (row >= self.start[:, None]))[:, None, :]
        new_row = offset.clamp(0, self.new - 1)
        descends = self.ancestors.expand(self.batch, -1, -1)
        descends = descends.gather(2, new_row[:, None, :].expand(-1, self.queries, -1))
        inside = ((offset >= 0) & (offset < self.new))[:, None, :]
        visible = context | (inside & descends)
        if window is not None:
            depth = torch.where(offset < 0, offset, self.depths.expand(self.batch, -1).gather(1, new_row))
            visible = visible & (depth[:, None, :] > self.query_depths[:, :, None] - window)
        return torch.zeros(visible.shape, dtype=dtype, device=row.device).masked_fill_(~visible, MASKED)
