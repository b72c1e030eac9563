"""From a configuration to what a runner needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from branchline.config import Config, ConfigError
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import Models
from branchline.engine.tree import TreeTopology
from branchline.engine.tree_spec import parse_tree, resolve_tree


def assemble(config: Config, progress: Callable[[str], None] | None = None) -> tuple[Models, TreeTopology]:
    """Loads the models and settles the tree. Without a tree no draft head is loaded.

    Raises ConfigError for a wrong tree (before anything is loaded) and ModelError for models that can't be served.
    """
    tree = parse_tree(config.model.tree)
    model = config.model if tree.num_nodes else dataclasses.replace(config.model, draft="none")
    models = load_models(model, config.engine, progress)
    tree = resolve_tree(config.model.tree, has_draft=models.draft is not None)
    if models.draft is not None and tree.guesses > (known := models.draft.spec.draft_vocab_size):
        raise ConfigError(
            f"model.tree: {tree.spec} asks for {tree.guesses} guesses, the draft head knows {known} tokens"
        )
    return models, tree
