"""How a program is executed: eagerly, or captured once in a CUDA graph and replayed.

A *program* is a function from tensors to tensors whose shapes its key fixes; an iteration, or half of one. It reads and
writes other tensors, too (weights, caches, the batch state), always the same ones. So a graph that recorded it serves
every later call with that key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]
#: Takes slots int64 `[batch]`, block_table int64 `[batch, width]`, and what else it needs.
Program = Callable[..., Tensors]

#: Captured graphs that are kept; the one that was not used for longest goes first.
MAX_GRAPHS = 128


class Executor(Protocol):
    """Runs `program(*inputs)`; calls with equal keys have equal shapes and do the same work."""

    def __call__(self, key: Hashable, program: Program, *inputs: torch.Tensor) -> Tensors: ...


class EagerExecutor:
    """Calls the program. For the CPU."""

    def __call__(self, key: Hashable, program: Program, *inputs: torch.Tensor) -> Tensors:  # noqa: ARG002
        return program(*inputs)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class GraphExecutor:
    """Captures each program in a CUDA graph at its first call and replays it from then on.

    All graphs share one memory pool, since one runs at a time. Outputs are the graph's own: the next replay overwrites
    them, so whoever wants them later copies them on the same stream. `idle_slot` is a row of the batch state that is
    never active: the runs that warm a program up touch nothing else.
    """

    def __init__(self, idle_slot: int, limit: int = MAX_GRAPHS) -> None:
        self._idle_slot = idle_slot
        self._limit = limit
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, program: Program, *inputs: torch.Tensor) -> Tensors:
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._graphs[key] = self._capture(program, inputs)
            if len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, program: Program, inputs: Tensors) -> _Captured:
        slots, block_table, *others = inputs
        static = (
            torch.full_like(slots, self._idle_slot),
            torch.zeros_like(block_table),  # the null block
            *(torch.empty_like(other).copy_(other) for other in others),
        )
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and workspaces allocated outside of the capture
            for _ in range(3):
                program(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = program(*static)
        return _Captured(graph, static, outputs)


def executor_for(device: torch.device, idle_slot: int) -> Executor:
    return GraphExecutor(idle_slot) if device.type == "cuda" else EagerExecutor()
