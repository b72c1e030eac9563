"""Random attention problems over a paged cache and their answers, in float64, worked out row by row in plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from branchline.engine.attention import PagedAttention
from branchline.engine.cache import BlockTables, PagedKvCache
from branchline.engine.models.protocol import Attention, KvGeometry

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Shape:
    """What a problem looks like. `tree`: `random`, `chain` or `star`; of the `nodes` new rows (the root included) the
    first `nodes - level` lie in the cache already, and the others are the queries."""

    bases: tuple[int, ...] = (5,)
    nodes: int = 4
    level: int = 0
    tree: str = "random"
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    block_size: int = 4
    spare_blocks: int = 1
    dtype: torch.dtype = torch.float32
    window: int | None = None
    late_start: bool = False
    own_widths: bool = False
    seed: int = 0

    @property
    def queries(self) -> int:
        return self.level or self.nodes


class Problem:
    """The tensors of one shape, on a device."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator().manual_seed(shape.seed)
        batch, queries = len(shape.bases), shape.queries
        draw = lambda *size: torch.randn(*size, generator=generator).to(device, shape.dtype)  # noqa: E731
        self.parents = [parents_of(shape.tree, shape.nodes, generator) for _ in range(batch)]
        self.offsets = list(range(shape.nodes - queries, shape.nodes))
        self.starts = [int(torch.randint(0, base + 1, (), generator=generator)) for base in shape.bases]
        if not shape.late_start:
            self.starts = [0] * batch
        width = (max(shape.bases) + shape.nodes - 1) // shape.block_size + 1 + shape.spare_blocks
        geometry = KvGeometry(2, shape.kv_heads, shape.head_dim, shape.dtype)
        self.table = (torch.randperm(batch * width, generator=generator) + 1).view(batch, width)
        self.cache = PagedKvCache(geometry, batch * width, shape.block_size, device)
        self.cache.storage.copy_(draw(*self.cache.storage.shape))
        self.query = draw(batch * queries, shape.kv_heads * shape.group, shape.head_dim)
        self.key, self.value = draw(2, batch * queries, shape.kv_heads, shape.head_dim)

    def attention(self, keep: list[bool] | None = None, line_from: int | None = None) -> Attention:
        """By default every query's K and V are written."""
        lines = [[path_to(parents, node) for node in range(self.shape.nodes)] for parents in self.parents]
        ancestors = torch.zeros(len(lines), self.shape.queries, self.shape.nodes, dtype=torch.bool)
        for row, paths in enumerate(lines):
            for query, offset in enumerate(self.offsets):
                ancestors[row, query, paths[offset]] = True
        depths = torch.tensor([[len(path) - 1 for path in paths] for paths in lines])
        return PagedAttention.over(
            self.cache,
            BlockTables(self.table.to(self.device), self.widths),
            torch.tensor(self.shape.bases, device=self.device),
            torch.tensor(self.starts, device=self.device),
            ancestors.to(self.device),
            torch.tensor([self.offsets], device=self.device),
            torch.tensor(keep or [True] * len(lines), device=self.device)[:, None].expand(-1, self.shape.queries),
            depths=depths.to(self.device),
            line_from=line_from,
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """The blocks that each sequence needs, or none: all of them."""
        ends = [base + self.shape.nodes for base in self.shape.bases] if self.shape.own_widths else []
        return tuple(-(-end // self.shape.block_size) for end in ends)

    def slot(self, row: int, position: int) -> int:
        size = self.shape.block_size
        return int(self.table[row, position // size]) * size + position % size

    def storage_after(self, layer: int) -> torch.Tensor:
        """The cache once every query's K and V are written."""
        storage = self.cache.storage.clone()
        for row, base in enumerate(self.shape.bases):
            for query, offset in enumerate(self.offsets):
                slot, index = self.slot(row, base + offset), row * self.shape.queries + query
                storage[layer, 0, :, slot] = self.key[index]
                storage[layer, 1, :, slot] = self.value[index]
        return storage

    def visible(self, row: int, offset: int) -> list[int]:
        """The positions in the cache that a query sees, by the definition."""
        base, parents, window = self.shape.bases[row], self.parents[row], self.shape.window
        path = path_to(parents, offset)
        position = base + len(path) - 1
        seen = [(place, place) for place in range(self.starts[row], base)]
        seen += [(base + len(path_to(parents, node)) - 1, base + node) for node in path]
        seen = [(at, place) for at, place in seen if place < self.table.shape[1] * self.shape.block_size]
        return [place for at, place in seen if window is None or at > position - window]

    def answer(self, storage: torch.Tensor, layer: int) -> torch.Tensor:
        """float64 `[tokens, heads, head_dim]`."""
        attended = []
        for row in range(len(self.shape.bases)):
            for query, offset in enumerate(self.offsets):
                slots = [self.slot(row, position) for position in self.visible(row, offset)]
                keys, values = storage[layer][:, :, slots].double().repeat_interleave(self.shape.group, 1)
                token = self.query[row * self.shape.queries + query].double()
                weights = torch.einsum("hd,hrd->hr", token, keys) * self.shape.head_dim**-0.5
                attended.append(torch.einsum("hr,hrd->hd", weights.softmax(-1), values))
        return torch.stack(attended)


def parents_of(tree: str, nodes: int, generator: torch.Generator) -> list[int]:
    """Each node's parent, the root's being -1."""
    if tree == "chain":
        return list(range(-1, nodes - 1))
    if tree == "star":
        return [-1] + [0] * (nodes - 1)
    return [-1] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, nodes)]


def path_to(parents: list[int], node: int) -> list[int]:
    """The nodes from the root to this one."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def check(shape: Shape, device: torch.device) -> None:
    """Attends and compares with the answer: what is written, and what comes out."""
    problem = Problem(shape, device)
    expected_storage = problem.storage_after(layer=1)
    expected = problem.answer(expected_storage, layer=1)
    attended = problem.attention().attend(1, problem.query, problem.key, problem.value, window=shape.window)
    assert torch.equal(problem.cache.storage, expected_storage)
    assert attended.dtype == shape.dtype
    tolerance = TOLERANCE[shape.dtype]
    torch.testing.assert_close(attended.double(), expected, atol=tolerance, rtol=tolerance)


def check_narrow_table(device: torch.device) -> None:
    """Nodes for which the block table has no room see what lies within it, and read nobody else's memory."""
    problem = Problem(Shape(bases=(6,), nodes=5, block_size=4), device)
    problem.table = problem.table[:, :2]
    expected = problem.answer(problem.cache.storage, layer=0)
    attended = problem.attention(keep=[False]).attend(0, problem.query, problem.key, problem.value)
    torch.testing.assert_close(attended.double(), expected, atol=1e-5, rtol=1e-5)
