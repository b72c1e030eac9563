"""What the engine's iterations accepted, read beside them: by node of a static tree, or by number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from branchline.config import EngineConfig
from branchline.core import Request
from branchline.engine.execute import Executor, Tensors, executor_for
from branchline.engine.models.protocol import Models
from branchline.engine.offline import Pipeline
from branchline.engine.state import BatchState
from branchline.engine.tree import StaticTree
from tools.draft_head.shapes import NodeCounts, Path

Program = Callable[..., Tensors]


def probe(models: Models, engine: EngineConfig, nodes: tuple[Path, ...], requests: list[Request]) -> NodeCounts:
    """Decodes the requests with a static tree of `nodes`, `engine.max_batch` at a time; counts the accepted nodes."""
    tree = StaticTree("probe", nodes)
    counter = PathCounter(tree, executor_for(models.device, idle_slot=engine.max_batch))
    pipeline = Pipeline(models, tree, engine, executor=counter, pipelined=False)
    counter.state = pipeline.decode.state
    outputs = pipeline.run(requests, engine.max_batch)
    accepted = sum(output.stats.accepted for output in outputs.values())
    assert accepted == sum(counter.counts), "the accepted paths don't give what the engine reports"
    return NodeCounts(counter.steps, dict(zip(nodes, counter.counts, strict=True)))


class PathCounter:
    """An Executor that counts how often each node of a static tree gave a token that was emitted: the tree is read from
    the batch's state before the program runs, which leaves the next one there. Needs `state` before the first call."""

    def __init__(self, tree: StaticTree, inner: Executor) -> None:
        self.state: BatchState | None = None
        self.steps = 0
        self.counts = [0] * tree.num_nodes
        self._inner = inner
        self._children: list[list[int]] = [[] for _ in range(tree.num_nodes + 1)]
        for node, parent in enumerate(tree.parents, 1):
            self._children[parent].append(node)

    def __call__(self, key: Hashable, program: Program, *inputs: torch.Tensor) -> Tensors:
        assert self.state is not None
        drafted = self.state.tree_tokens.index_select(0, inputs[0])
        outputs = self._inner(key, program, *inputs)
        token_ids, count, *_ = outputs
        for tokens, emitted, total in zip(drafted.tolist(), token_ids.tolist(), count.tolist(), strict=True):
            if total:
                self._walk(tokens, emitted[: total - 1])
        return outputs

    def _walk(self, tokens: list[int], accepted: list[int]) -> None:
        """`accepted` are the emitted tokens but the last, which is the model's own or ends the request."""
        self.steps += 1
        node = 0
        for token in accepted:
            node = next(child for child in self._children[node] if tokens[child - 1] == token)
            self.counts[node - 1] += 1


class LengthCounter:
    """An Executor that counts iterations by the number of tokens they emit. On the device and without a host read, so
    that it costs next to nothing where iterations are pipelined."""

    def __init__(self, depth: int, device: torch.device, inner: Executor) -> None:
        #: int64 `[depth + 2]`; entry 0 counts rows without a request.
        self._counts = torch.zeros(depth + 2, dtype=torch.int64, device=device)
        self._inner = inner

    def __call__(self, key: Hashable, program: Program, *inputs: torch.Tensor) -> Tensors:
        outputs = self._inner(key, program, *inputs)
        self._counts.index_add_(0, outputs[1], torch.ones_like(outputs[1]))
        return outputs

    def take(self) -> list[int]:
        """Iterations that emitted 1, 2, … tokens since the last call."""
        counts: list[int] = self._counts.tolist()
        self._counts.zero_()
        return counts[1:]
