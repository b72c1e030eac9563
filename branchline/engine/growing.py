"""Which grower grows a tree."""

from __future__ import annotations

import torch

from branchline.engine.draft import TreeGrower
from branchline.engine.dynamic_draft import DynamicGrower
from branchline.engine.static_draft import StaticGrower
from branchline.engine.tree import DynamicTree, TreeTopology


def grower_for(tree: TreeTopology, device: torch.device) -> TreeGrower | None:
    """None for a tree without nodes."""
    if tree.num_nodes == 0:
        return None
    return DynamicGrower(tree, device) if isinstance(tree, DynamicTree) else StaticGrower(tree, device)
