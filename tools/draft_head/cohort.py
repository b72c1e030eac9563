"""Sequences that begin together: each has as many rows as the others, so their cache is a box, and attention over it
needs neither padding nor a gather. For throughput; serving's sequences come when they like (`branchline.engine`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from branchline.engine.models.protocol import KvGeometry

#: Rows by which a box grows. On a CPU products of boxes that are looked at whole are several times as fast as those of
#: a part of each sequence's rows, so what isn't in use yet is computed with and masked.
GROWTH = 64


@dataclass
class Box:
    """Rows of `size` sequences, the first `rows` of each in use.

    keys, values: for each layer `[sequences, kv_heads, capacity, head_dim]`; states `[sequences, capacity, n]`, what is
    kept of the model's output for each row. Of all of them the first `size` sequences count.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    states: torch.Tensor
    size: int
    rows: int = 0

    @classmethod
    def empty(cls, size: int, kv: KvGeometry, state_size: int, device: torch.device) -> Box:
        # Zeros: a row that isn't in use has no weight, but no weight of what is not a number isn't nothing.
        shape = (size, kv.num_kv_heads, GROWTH, kv.head_dim)
        keys, values = (
            [torch.zeros(shape, dtype=kv.dtype, device=device) for _ in range(kv.num_layers)] for _ in range(2)
        )
        return cls(keys, values, torch.zeros((size, GROWTH, state_size), dtype=kv.dtype, device=device), size)

    @property
    def capacity(self) -> int:
        return self.states.shape[1]

    def like(self, size: int) -> Box:
        """`size` sequences whose rows are those of the first one here."""

        def repeated(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:1].repeat(size, *[1] * (tensor.ndim - 1))

        keys, values = ([repeated(tensor) for tensor in side] for side in (self.keys, self.values))
        return Box(keys, values, repeated(self.states), size, self.rows)

    def make_room(self) -> None:
        """For another row."""
        if self.rows < self.capacity:
            return
        for side in (self.keys, self.values):
            for layer, tensor in enumerate(side):  # one by one: the old one is freed before the next is made
                side[layer] = torch.nn.functional.pad(tensor[: self.size], (0, 0, 0, GROWTH))
        self.states = torch.nn.functional.pad(self.states[: self.size], (0, 0, 0, GROWTH))

    def remove(self, index: int) -> None:
        """The last sequence takes the place of the one at `index`."""
        last = self.size - 1
        if index != last:
            for tensor in (*self.keys, *self.values, self.states):
                tensor[index] = tensor[last]
        self.size = last

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        """One new row of each sequence, `[size, heads, head_dim]`, which sees itself and all before it."""
        (size, heads, width), row = query.shape, self.rows
        keys, values = self.keys[layer][:size], self.values[layer][:size]
        keys[:, :, row], values[:, :, row] = key, value
        grouped = query.reshape(size * key.shape[1], -1, width)
        scores = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2)).float().mul_(width**-0.5)
        scores[..., row + 1 :] = -torch.inf
        if window is not None and row >= window:
            scores[..., : row + 1 - window] = -torch.inf
        shares = torch.softmax(scores, -1).to(values.dtype)
        return torch.bmm(shares, values.flatten(0, 1)).view(size, heads, width)


class BoxAttention:
    """The `Attention` of one new row of every sequence, box by box (protocol.Attention)."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = boxes

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        """See protocol.Attention."""
        attended, start = torch.empty_like(query), 0
        for box in self._boxes:
            rows = slice(start, start + box.size)
            attended[rows] = box.attend(layer, query[rows], key[rows], value[rows], window)
            start = rows.stop
        return attended
