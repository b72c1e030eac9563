"""The export stage: the trained head in SafeAILab's format, in the model's dtype, as vLLM and Branchline load it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from branchline.config import ConfigError
from branchline.engine.models.locate import locate_model
from tools.draft_head.checkpoint import HeadTensors, write_head
from tools.draft_head.recipe import Recipe
from tools.draft_head.store import Work
from tools.draft_head.target import read_target
from tools.draft_head.vocabulary import read


def run(work: Work, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Writes the head of the last checkpoint, of a training that still goes on too."""
    if not work.checkpoint.exists():
        raise ConfigError(f"{work.root}: nothing is trained yet; `train` comes before `export`")
    state = torch.load(work.checkpoint, map_location="cpu", weights_only=True, mmap=True)
    target = read_target(locate_model(recipe.model, say))
    head = HeadTensors(state["head"], read(work.vocabulary).target_token_ids)
    work.head.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work.root) as directory:
        scratch = Path(directory)
        write_head(scratch, target.head_config, head, target.eos_token_ids, getattr(torch, recipe.dtype))
        for file in sorted(scratch.iterdir()):
            os.replace(file, work.head / file.name)
    size = sum(file.stat().st_size for file in work.head.iterdir())
    say(f"export: {work.head}, {size / 1e6:.1f} MB, after {state['step']:,} steps")
