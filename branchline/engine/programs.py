"""An iteration as programs that an executor can capture: whole, or cut in two where grammars need the host's answer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from branchline.engine.cache import BlockTables
from branchline.engine.execute import Executor, Tensors
from branchline.engine.flight import HostCopy
from branchline.engine.grammar import Grammar, node_masks
from branchline.engine.iteration import DecodeIteration, Emission, Verified
from branchline.engine.sampling import SamplingVariant

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """What one iteration runs on; see `DecodeIteration.run`. `grammars` by row."""

    slots: torch.Tensor
    block_tables: BlockTables
    variant: SamplingVariant
    grammars: Mapping[int, Grammar]


def execute(executor: Executor, iteration: DecodeIteration, batch: Batch) -> Emission:
    """Runs an iteration: as one program, or as two if there are grammars, whose masks come while the first one runs."""
    ids, widths = batch.block_tables.ids, batch.block_tables.widths
    inputs = (batch.slots, ids)
    key: Hashable = (iteration.nodes, *ids.shape, widths, batch.variant)
    if not batch.grammars:
        return _emission(executor(("run", key), partial(_run, iteration, widths, batch.variant), *inputs))
    trees = HostCopy(iteration.trees(batch.slots))
    verified = executor(("verify", key), partial(_verify, iteration, widths), *inputs)
    tokens, parents = trees.wait()
    masks = node_masks(batch.grammars, tokens, parents, verified[2].shape[2]).to(batch.slots.device)
    advance = partial(_advance, iteration, widths, batch.variant)
    return _emission(executor(("advance", key), advance, *inputs, masks, *verified))


def _run(
    iteration: DecodeIteration, widths: Widths, variant: SamplingVariant, slots: torch.Tensor, ids: torch.Tensor
) -> Tensors:
    return iteration.run(slots, BlockTables(ids, widths), variant).tensors


def _verify(iteration: DecodeIteration, widths: Widths, slots: torch.Tensor, ids: torch.Tensor) -> Tensors:
    return iteration.verify(slots, BlockTables(ids, widths)).tensors


def _advance(
    iteration: DecodeIteration,
    widths: Widths,
    variant: SamplingVariant,
    slots: torch.Tensor,
    ids: torch.Tensor,
    masks: torch.Tensor,
    *verified: torch.Tensor,
) -> Tensors:
    tokens, parents, logits, *auxiliary = verified
    whole = Verified(tokens, parents, logits, auxiliary[0] if auxiliary else None)
    return iteration.advance(slots, BlockTables(ids, widths), whole, variant, masks).tensors


def _emission(tensors: Tensors) -> Emission:
    token_ids, count, finish, path, *logprobs = tensors
    return Emission(token_ids, count, finish, path, (logprobs[0], logprobs[1], logprobs[2]) if logprobs else None)
