"""An iteration as programs that an executor can capture: whole, or cut in two where grammars need the host's answer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from branchline.engine.execute import Executor, Tensors
from branchline.engine.flight import HostCopy
from branchline.engine.grammar import Grammar, node_masks
from branchline.engine.iteration import DecodeIteration, Emission, Verified
from branchline.engine.sampling import SamplingVariant


@dataclass(frozen=True)
class Batch:
    """What one iteration runs on; see `DecodeIteration.run`. `grammars` by row."""

    slots: torch.Tensor
    block_table: torch.Tensor
    variant: SamplingVariant
    grammars: Mapping[int, Grammar]


def execute(executor: Executor, iteration: DecodeIteration, batch: Batch) -> Emission:
    """Runs an iteration: as one program, or as two if there are grammars, whose masks come while the first one runs."""
    inputs = (batch.slots, batch.block_table)
    key: Hashable = (iteration.nodes, *batch.block_table.shape, batch.variant)
    if not batch.grammars:
        return _emission(executor(("run", key), partial(_run, iteration, batch.variant), *inputs))
    trees = HostCopy(iteration.trees(batch.slots))
    verified = executor(("verify", key), partial(_verify, iteration), *inputs)
    tokens, parents = trees.wait()
    masks = node_masks(batch.grammars, tokens, parents, verified[2].shape[2]).to(batch.slots.device)
    advance = partial(_advance, iteration, batch.variant)
    return _emission(executor(("advance", key), advance, *inputs, masks, *verified))


def _run(
    iteration: DecodeIteration, variant: SamplingVariant, slots: torch.Tensor, block_table: torch.Tensor
) -> Tensors:
    return iteration.run(slots, block_table, variant).tensors


def _verify(iteration: DecodeIteration, slots: torch.Tensor, block_table: torch.Tensor) -> Tensors:
    return iteration.verify(slots, block_table).tensors


def _advance(
    iteration: DecodeIteration,
    variant: SamplingVariant,
    slots: torch.Tensor,
    block_table: torch.Tensor,
    masks: torch.Tensor,
    *verified: torch.Tensor,
) -> Tensors:
    tokens, parents, logits, *auxiliary = verified
    whole = Verified(tokens, parents, logits, auxiliary[0] if auxiliary else None)
    return iteration.advance(slots, block_table, whole, variant, masks).tensors


def _emission(tensors: Tensors) -> Emission:
    token_ids, count, finish, path, *logprobs = tensors
    return Emission(token_ids, count, finish, path, (logprobs[0], logprobs[1], logprobs[2]) if logprobs else None)
