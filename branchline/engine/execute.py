"""How an iteration is executed: eagerly, or captured once in a CUDA graph and replayed.

A *program* is a function of a few tensors whose shapes its key fixes. It reads and writes other tensors, too (weights,
caches, the batch state), always the same ones. So a graph that recorded it serves every later call with that key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

from branchline.engine.iteration import Emission

Program = Callable[[torch.Tensor, torch.Tensor], Emission]

#: Captured graphs that are kept; the one that was not used for longest goes first.
MAX_GRAPHS = 128


class Executor(Protocol):
    """Runs `program(slots, block_table)`; calls with equal keys have equal shapes and do the same work."""

    def __call__(self, key: Hashable, program: Program, slots: torch.Tensor, block_table: torch.Tensor) -> Emission: ...


class EagerExecutor:
    """Calls the program. For the CPU."""

    def __call__(self, key: Hashable, program: Program, slots: torch.Tensor, block_table: torch.Tensor) -> Emission:  # noqa: ARG002
        return program(slots, block_table)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    slots: torch.Tensor
    block_table: torch.Tensor
    emission: Emission


class GraphExecutor:
    """Captures each program in a CUDA graph at its first call and replays it from then on.

    All graphs share one memory pool, since one runs at a time. An emission's tensors are the graph's own: they are
    overwritten by the next replay, so whoever wants them copies them on the same stream. `idle_slot` is a row of the
    batch state that is never active: the runs that warm a program up touch nothing else.
    """

    def __init__(self, idle_slot: int, limit: int = MAX_GRAPHS) -> None:
        self._idle_slot = idle_slot
        self._limit = limit
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, program: Program, slots: torch.Tensor, block_table: torch.Tensor) -> Emission:
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(program, slots, block_table)
            if len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        captured.slots.copy_(slots)
        captured.block_table.copy_(block_table)
        captured.graph.replay()
        return captured.emission

    def _capture(self, program: Program, slots: torch.Tensor, block_table: torch.Tensor) -> _Captured:
        slots = torch.full_like(slots, self._idle_slot)
        block_table = torch.zeros_like(block_table)  # the null block
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and workspaces allocated outside of the capture
            for _ in range(3):
                program(slots, block_table)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            emission = program(slots, block_table)
        return _Captured(graph, slots, block_table, emission)


def executor_for(device: torch.device, idle_slot: int) -> Executor:
    return GraphExecutor(idle_slot) if device.type == "cuda" else EagerExecutor()
