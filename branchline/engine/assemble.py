"""From a configuration to what a runner needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from branchline.config import Config, ConfigError
from branchline.engine.models.load import load_models
from branchline.engine.models.locate import locate_draft
from branchline.engine.models.protocol import Models
from branchline.engine.tree import TreeTopology
from branchline.engine.tree_spec import resolve_tree


def assemble(config: Config, progress: Callable[[str], None] | None = None) -> tuple[Models, TreeTopology]:
    """Settles the tree and loads the models. Without a tree no draft head is loaded.

    Raises ConfigError for a wrong tree (before anything is loaded) and ModelError for models that can't be served.
    """
    tree = settle_tree(config, progress)
    model = config.model if tree.num_nodes else dataclasses.replace(config.model, draft="none")
    models = load_models(model, config.engine, progress)
    if models.draft is not None and tree.guesses > (known := models.draft.spec.draft_vocab_size):
        raise ConfigError(
            f"model.tree: {tree.spec} asks for {tree.guesses} guesses, the draft head knows {known} tokens"
        )
    return models, tree


def settle_tree(config: Config, progress: Callable[[str], None] | None = None) -> TreeTopology:
    """The configured tree, `default` and `best:N` being what the draft head brings. Raises as `assemble` does."""
    return resolve_tree(config.model.tree, lambda: locate_draft(config.model.draft, config.model.model, progress))
