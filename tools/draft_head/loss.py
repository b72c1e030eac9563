"""How far a draft is from the target: cross-entropy against the target's own probabilities, over the draft vocabulary.

The product with the head's rows is most of the work of training, and its `[rows, draft_vocab]` results are what would
fill the memory. So loss and gradient are computed together, some rows at a time, and only the gradients are kept: those
of the states and of the head's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: Rows that are computed at once: their logits of 8,192 tokens in bfloat16 fill 16 MiB.
ROWS = 1024


@dataclass(frozen=True)
class StepTargets:
    """What the rows of one step should predict. `probabilities` `[rows, draft_vocab]`; `choices` int64 `[rows]`, the
    target's first choice as a draft entry, or -1 where the draft vocabulary lacks it; `counted` bool `[rows]`, the rows
    that count. A row without a choice is not learned from: the head can't name what the target would say."""

    probabilities: torch.Tensor
    choices: torch.Tensor
    counted: torch.Tensor

    @property
    def learned(self) -> torch.Tensor:
        return self.counted & (self.choices >= 0)


@dataclass(frozen=True)
class StepLoss:
    """Sums over the rows that are learned from: `loss` takes part in the gradient. `value` and `agreed` are the loss
    and the number of rows whose first choice is the target's, None if they were not asked for."""

    loss: torch.Tensor
    value: torch.Tensor | None
    agreed: torch.Tensor | None


def soft_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, targets: StepTargets, *, measure: bool = True
) -> StepLoss:
    """states `[rows, hidden_size]`, in the dtype to compute in; weight `[draft_vocab, hidden_size]`.

    Without `measure`, `loss` is right in its gradient only, and its value is zero: telling it takes a few more passes
    over the logits.
    """
    loss, value, agreed = _SoftCrossEntropy.apply(states, weight, targets, measure)  # type: ignore[no-untyped-call]
    return StepLoss(loss, value if measure else None, agreed if measure else None)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states, weight, targets, measure = args
        cast = weight.to(states.dtype)
        learned = targets.learned
        wanted = any(ctx.needs_input_grad)
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        value = torch.zeros((), dtype=torch.float32, device=states.device)
        agreed = torch.zeros((), dtype=torch.int64, device=states.device)
        for start in range(0, len(states), ROWS):
            rows = slice(start, start + ROWS)
            wished, mask = targets.probabilities[rows], learned[rows, None]
            logits = states[rows] @ cast.T
            guessed = torch.softmax(logits, -1)
            if measure:
                top = logits.argmax(-1, keepdim=True)
                # The softmax's sum by way of the largest entry, whose probability is the most exact.
                log_sum = logits.gather(1, top).float() - guessed.gather(1, top).float().log()
                entropy = log_sum[:, 0] - torch.linalg.vecdot(wished, logits).float()
                value += (entropy * mask[:, 0]).sum()
                agreed += ((top[:, 0] == targets.choices[rows]) & mask[:, 0]).sum()
            if wanted:
                guessed.sub_(wished)
                grad_states[rows] = (guessed @ cast) * mask
                grad_weight += guessed.T @ (states[rows] * mask)
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.mark_non_differentiable(value, agreed)
        return value.clone(), value, agreed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        return grad_states * grads[0].to(grad_states.dtype), grad_weight * grads[0], None, None
