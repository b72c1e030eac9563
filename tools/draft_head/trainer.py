"""One step of training, and one measurement, on one batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tools.draft_head.batches import Batch
from tools.draft_head.head import DraftHead, Rows
from tools.draft_head.loss import ROWS, OutputRows, StepTargets
from tools.draft_head.recipe import TrainRecipe
from tools.draft_head.target import TargetParts

#: What `Sums` counts, by column.
LOSS, LEARNED, AGREED, COUNTED = range(4)


@dataclass(frozen=True)
class Metrics:
    """By step of the training-time test: the mean loss of the rows that are learned from, and the part of all rows in
    which the head's first choice is the target's."""

    loss: tuple[float, ...]
    agreement: tuple[float, ...]

    @classmethod
    def of(cls, sums: torch.Tensor) -> Metrics:
        """From sums `[steps, 4]`; waits for the device."""
        rows = sums.tolist()
        loss = tuple(round(row[LOSS] / max(row[LEARNED], 1), 4) for row in rows)
        return cls(loss, tuple(round(row[AGREED] / max(row[COUNTED], 1), 4) for row in rows))


class Trainer:
    """A head in training on one device. `dtype` is that of the products; parameters and their moments are float32."""

    def __init__(
        self,
        head: DraftHead,
        target: TargetParts,
        target_token_ids: torch.Tensor,
        recipe: TrainRecipe,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.head = head.to(device)
        self._recipe, self._device = recipe, device
        self._embedding = target.embedding.to(device, dtype)
        self._output = target.output[target_token_ids].to(device, dtype).T.contiguous()
        self._rows = OutputRows(head.lm_head.weight, dtype)
        # The target's, over the draft vocabulary; of its probabilities there are as many as the largest batch had rows.
        self._logits, self._probabilities = (
            torch.empty(rows, len(target_token_ids), dtype=dtype, device=device) for rows in (ROWS, 0)
        )
        entries = torch.full((len(target.embedding),), -1)
        entries[target_token_ids] = torch.arange(len(target_token_ids))
        self._entries = entries.to(device)
        matrices = [parameter for parameter in head.parameters() if parameter.ndim > 1]
        norms = [parameter for parameter in head.parameters() if parameter.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)

    def learn(self, batch: Batch, rate: float, *, measure: bool) -> torch.Tensor:
        """One optimiser step with a learning rate; returns sums `[steps, 4]`, meaningful if `measure`."""
        moved = self._moved(batch)
        targets = self._targets(moved)
        mean = 1.0 / targets[0].learned.sum().clamp(min=1)
        sums = torch.zeros(len(targets), 4, device=self._device)
        self._rows.begin()
        outputs, gradients = [], []
        for step, states in enumerate(self.head(moved.rows, self._embedding, len(targets))):
            outputs.append(states)
            gradients.append(self._rows.learn(states, targets[step], mean * self._recipe.ttt_decay**step))
            if measure:
                sums[step] = self._measured(states, targets[step])
        torch.autograd.backward(outputs, gradients)
        self.head.lm_head.weight.grad = self._rows.gradient
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self._recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums

    @torch.no_grad()
    def measure(self, batch: Batch) -> torch.Tensor:
        """Sums `[steps, 4]` of a batch that isn't learned from."""
        moved = self._moved(batch)
        targets = self._targets(moved)
        self._rows.begin()
        steps = enumerate(self.head(moved.rows, self._embedding, len(targets)))
        return torch.stack([self._measured(states, targets[step]) for step, states in steps])

    def _measured(self, states: torch.Tensor, targets: StepTargets) -> torch.Tensor:
        loss = self._rows.measure(states, targets)
        counts = (loss.value, targets.learned.sum(), loss.agreed, targets.counted.sum())
        return torch.stack([count.float() for count in counts])

    @torch.no_grad()
    def _targets(self, batch: Batch) -> list[StepTargets]:
        """Of each step. What row r of step k predicts is what row r + k of step 0 does, so there are `steps` more rows,
        to be read by rows that don't count."""
        steps, rows = self._recipe.ttt_steps, len(batch.hidden)
        if len(self._probabilities) < rows + steps:
            self._probabilities = self._probabilities.new_empty(rows + steps, self._probabilities.shape[1])
        probabilities = self._probabilities
        for start in range(0, rows, ROWS):
            part = batch.hidden[start : start + ROWS]
            logits = torch.mm(part, self._output, out=self._logits[: len(part)])
            torch.softmax(logits, -1, out=probabilities[start : start + len(logits)])
        probabilities[rows : rows + steps] = 0
        choices = torch.nn.functional.pad(self._entries[batch.choices], (0, steps), value=-1)
        shifts = (slice(step, step + rows) for step in range(steps))
        return [
            StepTargets(probabilities[shift], choices[shift], batch.left > step) for step, shift in enumerate(shifts)
        ]

    def _moved(self, batch: Batch) -> Batch:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._device, non_blocking=True)

        rows, dtype = batch.rows, self._embedding.dtype
        on_device = Rows(moved(rows.tokens), moved(rows.auxiliary).to(dtype), moved(rows.positions), rows.spans)
        hidden = moved(batch.hidden).to(dtype)
        return replace(batch, rows=on_device, hidden=hidden, choices=moved(batch.choices), left=moved(batch.left))


def learning_rate(recipe: TrainRecipe, step: int, total: int) -> float:
    """Rises in a line, then falls along half a cosine to nothing. Steps count from 0."""
    warm = max(1, round(recipe.warmup * total))
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    part = (step - warm) / max(1, total - warm)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * part))
