"""How far a draft is from the target: cross-entropy against the target's own probabilities, over the draft vocabulary.

The product with the head's output rows is most of the work of training, and its `[rows, draft_vocab]` results are what
would fill the memory. So the loss and its gradients are computed together, some rows at a time, in buffers that are
used again: fresh memory of that size takes a CPU about as long as what is computed in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    """Of the rows that are learned from: the sum of their losses, and how often their first choice is the target's."""

    value: torch.Tensor
    agreed: torch.Tensor


class OutputRows:
    """The head's output rows as they are computed with, and the gradient of their parameter. Not thread-safe.

    parameter float32 `[draft_vocab, hidden_size]`; `dtype` is that of the products.
    """

    def __init__(self, parameter: torch.Tensor, dtype: torch.dtype) -> None:
        vocab, device = len(parameter), parameter.device
        self._parameter = parameter
        self._weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        # Every product reads its right factor in a line, which is faster than what it costs to turn it once a step.
        self._turned = torch.empty(parameter.shape[::-1], dtype=dtype, device=device)
        self._product = torch.empty_like(self._weight)
        self._logits, self._guessed = torch.empty((2, ROWS, vocab), dtype=dtype, device=device)
        #: float32 `[draft_vocab, hidden_size]`: the sum of what `learn` has found since `begin`.
        self.gradient = torch.zeros_like(parameter)

    @torch.no_grad()
    def begin(self) -> None:
        """To be called when the parameter has changed."""
        self._weight.copy_(self._parameter)
        self._turned.copy_(self._weight.T)
        self.gradient.zero_()

    @torch.no_grad()
    def learn(self, states: torch.Tensor, targets: StepTargets, scale: torch.Tensor | float) -> torch.Tensor:
        """The gradient of `scale` times the sum of the rows' losses by the states, `[rows, hidden_size]`, in the dtype
        of the products; that by the output rows is added to `gradient`."""
        gradient = torch.empty_like(states)
        shares = (targets.learned * scale).to(states.dtype)[:, None]
        for rows, logits in self._logits_of(states):
            guessed = torch.softmax(logits, -1, out=self._guessed[: len(logits)])
            guessed.sub_(targets.probabilities[rows])
            gradient[rows] = (guessed @ self._weight) * shares[rows]
            product = torch.mm(guessed.T, states[rows] * shares[rows], out=self._product)
            # In pieces, for there is a copy in between, in float32: a small one has been allocated before.
            for sum_, part in zip(torch.split(self.gradient, ROWS), torch.split(product, ROWS), strict=True):
                sum_ += part
        return gradient

    @torch.no_grad()
    def measure(self, states: torch.Tensor, targets: StepTargets) -> StepLoss:
        """Takes as long again as the first half of `learn`."""
        learned = targets.learned
        value = torch.zeros((), dtype=torch.float32, device=states.device)
        agreed = torch.zeros((), dtype=torch.int64, device=states.device)
        for rows, logits in self._logits_of(states):
            guessed = torch.softmax(logits, -1, out=self._guessed[: len(logits)])
            top = logits.argmax(-1, keepdim=True)
            # The softmax's sum by way of the largest entry, whose probability is the most exact.
            log_sum = logits.gather(1, top).float() - guessed.gather(1, top).float().log()
            entropy = log_sum[:, 0] - torch.linalg.vecdot(targets.probabilities[rows], logits).float()
            value += (entropy * learned[rows]).sum()
            agreed += ((top[:, 0] == targets.choices[rows]) & learned[rows]).sum()
        return StepLoss(value, agreed)

    def _logits_of(self, states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Part by part, in the buffer: each is gone with the next."""
        for start in range(0, len(states), ROWS):
            part = states[start : start + ROWS]
            yield slice(start, start + ROWS), torch.mm(part, self._turned, out=self._logits[: len(part)])
