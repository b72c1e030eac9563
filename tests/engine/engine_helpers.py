"""Tiny engines that accept often: a vocabulary of a dozen tokens makes a random head right now and then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config

from branchline.config import Config, EngineConfig, ModelConfig
from branchline.core import DraftTree, FinishReason, KvPart, KvSpan, Request
from branchline.engine.decode import Allocation, DecodeRunner
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import DraftSpec, KvGeometry, Models, TargetSpec
from branchline.engine.prefill import PrefillRunner
from branchline.engine.sequence import KvCaches
from branchline.engine.tree import TreeTopology, parse_tree

VOCAB = 12


def random_parents(generator: torch.Generator, drafted: int) -> torch.Tensor:
    """int64 `[drafted + 1]`: a random tree, the root's parent being -1."""
    draws = torch.rand(drafted, generator=generator)
    return torch.tensor([-1, *[int(draw * (node + 1)) for node, draw in enumerate(draws.tolist())]])


def random_tree(generator: torch.Generator, drafted: int, guesses: int = 4) -> TreeTopology:
    """A random static tree, each node having its first guesses as children, as many as come."""
    choices: list[tuple[int, ...]] = []
    while len(choices) < drafted:
        parents = [(), *choices]
        parent = parents[int(torch.randint(len(parents), (), generator=generator))]
        rank = sum(choice[:-1] == parent for choice in choices)
        if rank < guesses:
            choices.append((*parent, rank))
    return TreeTopology("random", tuple(choices))


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


class Pipeline:
    """A prefill and a decode runner in one process, with the hand-off's bytes between them."""

    def __init__(self, models: Models, tree: TreeTopology | str, **engine: int) -> None:
        settings = dataclasses.replace(Config().engine, **{"kv_cache_mib": 8, "block_size": 4} | engine)
        tree = parse_tree(tree) if isinstance(tree, str) else tree
        self.prefill = PrefillRunner(models, settings, tree)
        self.decode = DecodeRunner(models, settings, tree)
        self.forwards: dict[str, int] = {}

    def hand_off(
        self, request: Request, ship_draft: bool = True
    ) -> tuple[Allocation, int, DraftTree, FinishReason | None]:
        """Prefills and starts decoding, unless the first token ends the request."""
        allocation = self.decode.allocate(request.max_length)
        task = self.prefill.begin(request)
        kv = self.prefill.target_kv
        while not task.done:
            tokens = self.prefill.advance(task)
            span = KvSpan(KvPart.TARGET, (0, kv.num_layers), (0, kv.num_kv_heads), tokens)
            self.decode.import_kv(allocation, span, self.prefill.export(task, span))
        first, finish = self.prefill.first_token(task)
        tree = self.prefill.draft(task) if ship_draft else DraftTree()
        ship_draft = ship_draft and self.prefill.draft_kv is not None
        if ship_draft and self.prefill.draft_kv:
            kv = self.prefill.draft_kv
            span = KvSpan(KvPart.DRAFT, (0, kv.num_layers), (0, kv.num_kv_heads), (1, len(request.context) + 1))
            self.decode.import_kv(allocation, span, self.prefill.export(task, span))
        self.prefill.release(task)
        if finish is None:
            self.decode.start(allocation, request, first, tree, ship_draft)
        return allocation, first, tree, finish

    def run(self, requests: list[Request], in_flight: int = 1, ship_draft: bool = True) -> dict[str, list[int]]:
        """All requests to their ends, `in_flight` at a time; returns the tokens of each."""
        outputs: dict[str, list[int]] = {}
        waiting = list(requests)
        live: dict[int, str] = {}
        while waiting or live:
            while waiting and len(live) < in_flight:
                request = waiting.pop(0)
                allocation, first, _, finish = self.hand_off(request, ship_draft)
                outputs[request.request_id] = [first]
                self.forwards[request.request_id] = 0
                if finish is None:
                    live[allocation.slot] = request.request_id
                else:
                    self.decode.release(allocation)
            for result in self.decode.step():
                name = live[result.allocation.slot]
                outputs[name] += result.token_ids
                self.forwards[name] += 1
                if result.finish is not None:
                    del live[result.allocation.slot]
                    self.decode.release(result.allocation)
            self.decode.check_integrity()
        assert self.decode.pool.used == self.prefill.pool.used == self.decode.running == 0
        return outputs


def tiny_caches(block_size: int, dtype: torch.dtype = torch.float32, draft: bool = True) -> KvCaches:
    """Caches of models that are never run."""

    class Shape:
        def __init__(self, spec: TargetSpec | DraftSpec) -> None:
            self.spec = spec

    target = Shape(TargetSpec(KvGeometry(3, 2, 4, dtype), 8, 8, 32, ()))
    head = Shape(DraftSpec(KvGeometry(1, 2, 4, dtype), 8, 8)) if draft else None
    models = Models("shapes", target, head, None, torch.device("cpu"), dtype)  # type: ignore[arg-type]
    return KvCaches(models, EngineConfig(block_size=block_size, kv_cache_mib=1), parse_tree("chain:1"))
