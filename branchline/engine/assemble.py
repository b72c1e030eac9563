"""From a configuration to what a runner needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from branchline.config import Config
from branchline.engine.models.load import load_models
from branchline.engine.models.protocol import Models
from branchline.engine.tree import TreeTopology, parse_tree, resolve_tree


def assemble(config: Config, progress: Callable[[str], None] | None = None) -> tuple[Models, TreeTopology]:
    """Loads the models and settles the tree. Without a tree no draft head is loaded.

    Raises ConfigError for a wrong tree (before anything is loaded) and ModelError for models that can't be served.
    """
    tree = parse_tree(config.model.tree)
    model = config.model if tree.num_nodes else dataclasses.replace(config.model, draft="none")
    models = load_models(model, config.engine, progress)
    return models, resolve_tree(config.model.tree, has_draft=models.draft is not None)
