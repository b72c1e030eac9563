"""Trains an EAGLE-3 draft head for a model, from text that the model writes itself.

    python -m tools.draft_head all --work DIR                       data, features, train, export, evaluate
    python -m tools.draft_head data --work DIR --model MY/MODEL     one stage; a second call goes on where it stopped

Settings come from --recipe, else from the work directory, else from recipes/default.yaml (docs/draft-heads.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from branchline.config import DEVICES, PROVIDERS, ConfigError
from tools.draft_head.recipe import RECIPES, Recipe, load
from tools.draft_head.store import Work

STAGES = ("data", "features", "train", "export", "evaluate")


class Stage(Protocol):
    """A stage's module. `run` goes on where it stopped, and returns at once if nothing is left to do."""

    def run(self, work: Work, recipe: Recipe, say: Callable[[str], None]) -> None: ...


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    work = Work(options.work)
    try:
        recipe = settle(work, options)
        if recipe.threads:  # before torch is imported
            os.environ["OMP_NUM_THREADS"] = str(recipe.threads)
        from branchline.engine.models.errors import ModelError
        from branchline.wire.memory import keep_large_buffers

        keep_large_buffers()  # tensors of many MiB come and go in every step

        try:
            work.begin(recipe)
            for name in STAGES if options.stage == "all" else (options.stage,):
                began = time.monotonic()
                say(f"== {name}")
                stage = cast(Stage, importlib.import_module(f"tools.draft_head.{name}"))
                stage.run(work, recipe, say)
                say(f"== {name} took {time.monotonic() - began:,.0f} s")
        except ModelError as error:
            raise ConfigError(str(error)) from error
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def settle(work: Work, options: argparse.Namespace) -> Recipe:
    """The recipe of this call: the file's, with the flags laid over. Raises ConfigError."""
    path = options.recipe or (work.recipe if work.recipe.exists() else RECIPES / "default.yaml")
    names = ("model", "provider", "device", "threads", "seed")
    flags = {name: value for name in names if (value := getattr(options, name)) is not None}
    return dataclasses.replace(load(path), **flags)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.draft_head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, required=True, help="the directory of everything that is made")
    parser.add_argument("--recipe", type=Path, help="a YAML file; see tools/draft_head/recipes")
    parser.add_argument("--model", help="the model to train a head for: a directory, a Hugging Face id or `default`")
    parser.add_argument("--provider", choices=PROVIDERS)
    parser.add_argument("--device", choices=DEVICES)
    parser.add_argument("--threads", type=int, help="compute threads; 0 leaves them to PyTorch")
    parser.add_argument("--seed", type=int)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
