"""Tiny engines that accept often: a vocabulary of a dozen tokens makes a random head right now and then."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config

from branchline.config import EngineConfig, ModelConfig
from branchline.core import Fingerprint, Request
from branchline.engine.execute import Executor
from branchline.engine.load_budget import LoadBudget
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import DraftSpec, KvGeometry, Models, TargetSpec
from branchline.engine.offline import Pipeline
from branchline.engine.sequence import KvCaches
from branchline.engine.tree import StaticTree, TreeTopology
from branchline.engine.tree_spec import parse_tree

VOCAB = 12

#: Sixteen nodes of depth four, as `--tree` takes them.
BUSHY = "[[0],[1],[0,0],[2],[3],[0,1],[1,0],[4],[0,0,0],[5],[0,2],[0,3],[2,0],[0,0,1],[1,1],[0,0,0,0]]"


def random_parents(generator: torch.Generator, drafted: int) -> torch.Tensor:
    """int64 `[drafted + 1]`: a random tree, the root's parent being -1."""
    draws = torch.rand(drafted, generator=generator)
    return torch.tensor([-1, *[int(draw * (node + 1)) for node, draw in enumerate(draws.tolist())]])


def random_tree(generator: torch.Generator, drafted: int, guesses: int = 4) -> StaticTree:
    """A random static tree, each node having its first guesses as children, as many as come."""
    choices: list[tuple[int, ...]] = []
    while len(choices) < drafted:
        parents = [(), *choices]
        parent = parents[int(torch.randint(len(parents), (), generator=generator))]
        rank = sum(choice[:-1] == parent for choice in choices)
        if rank < guesses:
            choices.append((*parent, rank))
    return StaticTree("random", tuple(choices))


def save_tiny_pair(directory: Path) -> tuple[Path, Path]:
    """A tiny Llama and a random head over its whole vocabulary."""
    save_tiny_model(directory / "model", tiny_config(vocab_size=VOCAB, initializer_range=0.25))
    tensors = head_tensors(draft_vocab=VOCAB) | {
        "d2t": torch.zeros(VOCAB, dtype=torch.int64),
        "t2d": torch.ones(VOCAB, dtype=torch.bool),
    }
    config = head_config(vocab_size=VOCAB, draft_vocab_size=VOCAB)
    return directory / "model", save_head(directory / "head", config, tensors)


def load_tiny(pair: tuple[Path, Path], draft: bool = True) -> Models:
    model, head = pair
    config = ModelConfig(
        model=str(model), draft=str(head) if draft else "none", dtype="float32", provider="reference", device="cpu"
    )
    return load_models(config, EngineConfig(threads=1))


class TinyPipeline(Pipeline):
    """Small caches, and settings by name; `run_text` returns tokens alone."""

    def __init__(
        self,
        models: Models,
        tree: TreeTopology | str,
        executor: Executor | None = None,
        pipelined: bool = False,
        load_budget: LoadBudget | None = None,
        **engine: Any,
    ) -> None:
        settings = dataclasses.replace(EngineConfig(), **{"kv_cache_mib": 8, "block_size": 4} | engine)
        topology = parse_tree(tree) if isinstance(tree, str) else tree
        super().__init__(models, topology, settings, executor=executor, pipelined=pipelined, load_budget=load_budget)
        self.forwards = 0

    def run_text(self, requests: list[Request], in_flight: int = 1, ship_draft: bool = True) -> dict[str, list[int]]:
        outputs = self.run(requests, in_flight, ship_draft)
        self.forwards = sum(output.stats.target_forwards for output in outputs.values())
        return {name: output.token_ids for name, output in outputs.items()}


def shapes(dtype: torch.dtype = torch.float32, draft: bool = True) -> Models:
    """Models that are never run."""

    class Shape:
        def __init__(self, spec: TargetSpec | DraftSpec) -> None:
            self.spec = spec

    target = Shape(TargetSpec(KvGeometry(3, 2, 4, dtype), 8, 8, 32, ()))
    head = Shape(DraftSpec(KvGeometry(1, 2, 4, dtype), 8, 8)) if draft else None
    fingerprint = Fingerprint({"weights": "none"}, "none" if draft else "")
    return Models("shapes", target, head, fingerprint, torch.device("cpu"), dtype)  # type: ignore[arg-type]


def tiny_caches(block_size: int, dtype: torch.dtype = torch.float32, draft: bool = True) -> KvCaches:
    """Caches of models that are never run."""
    models = shapes(dtype, draft)
    return KvCaches(models, EngineConfig(block_size=block_size, kv_cache_mib=1), parse_tree("chain:1"))
