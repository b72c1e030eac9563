"""The head that training begins with: a fresh one, or one that was trained before."""

from __future__ import annotations

import torch

from tools.draft_head.checkpoint import HeadTensors
from tools.draft_head.head import DraftHead
from tools.draft_head.target import TargetParts

#: Standard deviation of fresh weights, as most models are initialised.
_SPREAD = 0.02


@torch.no_grad()
def initialise(head: DraftHead, target: TargetParts, target_token_ids: torch.Tensor, seed: int) -> None:
    """Fresh weights. The last norm and the output rows are the target's: so the head need only learn states that the
    target itself could have had, and the rows need only be refined."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, _SPREAD, generator=generator)
    head.norm.weight.copy_(target.norm)
    head.lm_head.weight.copy_(target.output[target_token_ids])


@torch.no_grad()
def continue_from(head: DraftHead, before: HeadTensors, target_token_ids: torch.Tensor) -> None:
    """A trained head's weights. Its output rows go to the entries of the same tokens; entries that it lacked keep what
    they have."""
    parameters = dict(before.parameters)
    rows = parameters.pop("lm_head.weight")
    head.load_state_dict(parameters, strict=False)
    place = {token: index for index, token in enumerate(before.target_token_ids.tolist())}
    ours = [index for index, token in enumerate(target_token_ids.tolist()) if token in place]
    theirs = [place[int(target_token_ids[index])] for index in ours]
    head.lm_head.weight[ours] = rows[theirs].to(head.lm_head.weight.dtype)
