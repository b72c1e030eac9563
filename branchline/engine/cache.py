"""The paged KV cache: tensors and the ways rows get in and out of them.

A *slot* is a row of the cache: block * block_size + offset. A sequence's block table maps token positions to
slots; target and draft cache share block ids, so one table serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from branchline.engine.blocks import NULL_BLOCK
from branchline.engine.models.protocol import KvGeometry

#: Runs of slots from which on rows are read and loaded by index: each run is an operation, and on a GPU a launch.
MANY_RUNS = 8


@dataclass(frozen=True)
class BlockTables:
    """Where the rows of a batch's sequences lie: ids int64 `[batch, width]`.

    `widths`, by default all: how many blocks of each sequence hold rows that matter. On the CPU, where shapes decide
    how much is read, the rest is left out, best in a batch that is sorted by it. They are shapes and no tensor, so
    nothing is read back from the device.
    """

    ids: torch.Tensor
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        batch, width = self.ids.shape
        assert not self.widths or (len(self.widths) == batch and max(self.widths) <= width), (self.widths, width)

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    def some(self, first: int, count: int) -> torch.Tensor:
        """The tables of the sequences from `first` on, `count` at most, as wide as the widest of them needs."""
        rows = slice(first, first + count)
        return self.ids[rows, : max(self.widths[rows], default=self.ids.shape[1])]


def slots_of(block_table: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slots of token positions: block_table `[batch, width]`, positions `[batch, n]` -> int64 `[batch, n]`.

    Positions outside the table land in its last block; callers mask those rows away with `null_unless`.
    """
    index = torch.div(positions, block_size, rounding_mode="floor").clamp(0, block_table.shape[1] - 1)
    return block_table.gather(1, index) * block_size + positions.remainder(block_size)


def null_unless(keep: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Sends the rows that must not be written to the null block."""
    return torch.where(keep, slots, NULL_BLOCK)


class PagedKvCache:
    """`storage` is `[layers, 2, kv_heads, blocks * block_size, head_dim]`: K at 0, V at 1.

    Heads come before slots so that a block of one head is contiguous: attention gathers whole blocks, and
    its matrix products need no transposed copy.
    """

    def __init__(self, geometry: KvGeometry, blocks: int, block_size: int, device: torch.device) -> None:
        """`blocks` counts those of the pool; the null block comes on top."""
        self.geometry = geometry
        self.block_size = block_size
        self.storage = torch.zeros(
            (geometry.num_layers, 2, geometry.num_kv_heads, (blocks + 1) * block_size, geometry.head_dim),
            dtype=geometry.dtype,
            device=device,
        )
        # Views made once: on a CPU making them for every layer of every pass would show.
        self._rows: list[torch.Tensor] = [layer.view(-1, geometry.head_dim) for layer in self.storage]
        self._blocks: list[torch.Tensor] = [
            layer.view(2 * geometry.num_kv_heads, -1, block_size * geometry.head_dim) for layer in self.storage
        ]

    def places(self, slots: torch.Tensor) -> torch.Tensor:
        """Where `write` puts rows: slots `[n]` -> int64 `[n * 2 * kv_heads]`, the same for all layers."""
        slots_per_head = self.storage.shape[3]
        heads = torch.arange(2 * self.geometry.num_kv_heads, device=slots.device)
        return (heads * slots_per_head + slots[:, None]).reshape(-1)

    def write(self, layer: int, places: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores rows: key and value `[n, kv_heads, head_dim]`, `places` from their slots."""
        self._rows[layer].index_copy_(0, places, torch.cat([key, value], 1).view(-1, self.geometry.head_dim))

    def gather(self, layer: int, blocks: torch.Tensor, batch: int) -> torch.Tensor:
        """K and V of `batch` sequences of as many blocks each, `[2, kv_heads * batch, rows, head_dim]`: sequence b of
        head h is at h * batch + b. `blocks` int64 holds their block tables in a line."""
        gathered = self._blocks[layer].index_select(1, blocks)
        return gathered.view(2, self.geometry.num_kv_heads * batch, -1, self.geometry.head_dim)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies rows in every layer, K and V: slots int64 `[batch, n]`, those of one sequence in a row of each.

        All of a sequence's rows are read before the first is written: the ranges may overlap. Sequences must not write
        what another reads, the null block aside. This is the KV rewind (docs/architecture.md, section 4).
        """
        if self.storage.is_cuda:
            from branchline.engine.triton_rewind import move  # triton exists on GPU machines alone

            move(self.storage, source, target)
            return
        planes = self.storage.flatten(0, 2)
        planes.index_copy_(1, target.reshape(-1), planes.index_select(1, source.reshape(-1)))

    def read(self, layers: tuple[int, int], heads: tuple[int, int], runs: Sequence[range]) -> torch.Tensor:
        """Rows in the wire's canonical order: `[layers, 2, tokens, heads, head_dim]`, contiguous. The tokens' slots are
        given as runs without gaps. Few of them are copied one by one, which is several times as fast as by index."""
        part = self.storage[layers[0] : layers[1], :, heads[0] : heads[1]]
        if len(runs) > MANY_RUNS:
            return part.index_select(3, self._slots(runs)).transpose(2, 3).contiguous()
        pieces = [part[:, :, :, run.start : run.stop].transpose(2, 3) for run in runs]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)).contiguous()

    def load(self, layers: tuple[int, int], heads: tuple[int, int], runs: Sequence[range], rows: torch.Tensor) -> None:
        """The inverse of `read`."""
        part = self.storage[layers[0] : layers[1], :, heads[0] : heads[1]]
        if len(runs) > MANY_RUNS:
            part.index_copy_(3, self._slots(runs), rows.transpose(2, 3))
            return
        for run, piece in zip(runs, torch.split(rows, [len(run) for run in runs], 2), strict=True):
            part[:, :, :, run.start : run.stop] = piece.transpose(2, 3)

    def _slots(self, runs: Sequence[range]) -> torch.Tensor:
        return torch.tensor([slot for run in runs for slot in run], device=self.storage.device)
