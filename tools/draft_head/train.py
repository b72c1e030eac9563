"""The train stage: the draft vocabulary, then every batch of the schedule, with a checkpoint now and then.

A stopped run goes on from its last checkpoint and ends with the same weights: the order of the data depends on the seed
and the step alone, and nothing else is random.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from branchline.config import ConfigError
from branchline.engine.models.load import pick_device
from branchline.engine.models.locate import locate_model
from branchline.engine.models.protocol import KvGeometry, TargetSpec
from tools.draft_head.batches import Batch, Features, Sample, cut_batches, schedule, split
from tools.draft_head.checkpoint import read_head
from tools.draft_head.head import DraftHead
from tools.draft_head.progress import Progress
from tools.draft_head.recipe import Recipe, TrainRecipe
from tools.draft_head.start import continue_from, initialise
from tools.draft_head.store import Work
from tools.draft_head.target import TargetParts, read_target
from tools.draft_head.trainer import Metrics, Trainer, learning_rate
from tools.draft_head.vocabulary import settle

#: How often the held-out conversations are measured in a whole run.
_MEASUREMENTS = 20


def run(work: Work, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Trains to the end of the schedule. Without features there is nothing to train on: ModelError."""
    device = pick_device(recipe.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    target = read_target(locate_model(recipe.model, say))
    before = read_head(Path(recipe.train.start).expanduser(), _spec(target)) if recipe.train.start else None
    features = Features(work.feature_shards())
    try:
        learned_from, held_out = split(features.samples, recipe.seed)
        vocabulary = settle(work, recipe.train.draft_vocab, target, features, before)
        say(
            f"{len(learned_from):,} conversations to learn from, {len(held_out)} held out; "
            f"{len(vocabulary.target_token_ids):,} draft tokens, {vocabulary.coverage:.2%} of the written tokens"
        )
        head = DraftHead(
            target.head_config, len(vocabulary.target_token_ids), target.config.max_position + recipe.train.ttt_steps
        )
        initialise(head, target, vocabulary.target_token_ids, recipe.seed)
        if before is not None:
            continue_from(head, before, vocabulary.target_token_ids)
        dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
        trainer = Trainer(head, target, vocabulary.target_token_ids, recipe.train, device, dtype)
        plan = schedule(
            [entry.learned for entry in learned_from], recipe.train.batch_tokens, recipe.train.epochs, recipe.seed
        )
        _train(work, recipe.train, say, trainer, _Data(features, learned_from, held_out, plan, recipe.train))
    finally:
        features.close()


@dataclass(frozen=True)
class _Data:
    """`plan` has the batches of the whole run, as indices of `learned_from`."""

    features: Features
    learned_from: list[Sample]
    held_out: list[Sample]
    plan: list[list[int]]
    recipe: TrainRecipe

    def batches(self, first: int) -> Iterator[Batch]:
        """From step `first` on. The next one is read while the last one is computed with."""
        with ThreadPoolExecutor(1) as reader:
            waiting = None
            for indices in self.plan[first:]:
                coming = reader.submit(self._read, [self.learned_from[index] for index in indices])
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            if waiting is not None:
                yield waiting.result()

    def held_out_batches(self) -> Iterator[Batch]:
        lengths = [sample.learned for sample in self.held_out]
        for indices in cut_batches(range(len(lengths)), lengths, self.recipe.batch_tokens):
            yield self._read([self.held_out[index] for index in indices])

    def learned_tokens(self, first: int, last: int) -> int:
        """Of the steps `first` … `last - 1`."""
        return sum(self.learned_from[index].learned for indices in self.plan[first:last] for index in indices)

    def _read(self, samples: list[Sample]) -> Batch:
        return self.features.batch(samples, self.recipe.ttt_steps)


def _train(work: Work, recipe: TrainRecipe, say: Callable[[str], None], trainer: Trainer, data: _Data) -> None:
    total = len(data.plan)
    first = _resume(work, trainer, total)
    if first >= total:
        say(f"train: all {total:,} steps are done")
        return
    log = _Log(work.log, first)
    every = max(1, total // _MEASUREMENTS)
    saved = time.monotonic()
    done = data.learned_tokens(0, first)
    with Progress(data.learned_tokens(0, total), "tokens", say, done=done) as progress:
        for step, batch in enumerate(data.batches(first), first):
            rate, measured = learning_rate(recipe, step, total), (step + 1) % recipe.log_every == 0
            sums = trainer.learn(batch, rate, measure=measured)
            note = ""
            if measured:
                metrics = Metrics.of(sums)
                log.write({"step": step + 1, "of": total, "learning_rate": rate} | asdict(metrics))
                note = f"step {step + 1}: loss {metrics.loss[0]:.3f}, agrees {_percent(metrics.agreement)}"
            last = step + 1 == total
            if last or (step + 1) % every == 0:
                held_out = sum(map(trainer.measure, data.held_out_batches()), torch.zeros(()))
                if data.held_out:
                    metrics = Metrics.of(held_out)
                    log.write({"step": step + 1, "of": total, "held_out": asdict(metrics)})
                    say(
                        f"step {step + 1} of {total:,}: held-out loss {metrics.loss[0]:.3f}, "
                        f"agrees {_percent(metrics.agreement)}"
                    )
            progress.add(data.learned_tokens(step, step + 1), note)
            if last or time.monotonic() - saved >= recipe.checkpoint_every_s:
                _save(work, trainer, step + 1, total)
                saved = time.monotonic()


def _save(work: Work, trainer: Trainer, step: int, total: int) -> None:
    state = {"step": step, "of": total, "head": trainer.head.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    with work.writing(work.checkpoint) as temporary:
        torch.save(state, temporary)


def _resume(work: Work, trainer: Trainer, total: int) -> int:
    """The number of steps that are done. Raises ConfigError if the data are not those that the training began with."""
    if not work.checkpoint.exists():
        return 0
    state = torch.load(work.checkpoint, map_location="cpu", weights_only=True)
    if state["of"] != total:
        raise ConfigError(
            f"{work.checkpoint} was begun with the data for {state['of']:,} steps, now they make {total:,}; "
            "to train on with more data, take another directory and name this one's head as train.start"
        )
    trainer.head.load_state_dict(state["head"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


class _Log:
    """A line of JSON for each report. Lines of steps that a stopped run has lost are dropped: they come again."""

    def __init__(self, path: Path, steps: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= steps]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, entry: dict[str, object]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _percent(agreement: tuple[float, ...]) -> str:
    return " ".join(f"{100 * part:.1f}" for part in agreement) + " %"


def _spec(target: TargetParts) -> TargetSpec:
    """As much of it as checking a head against its target needs."""
    config = target.config
    kv = KvGeometry(config.num_layers, config.num_kv_heads, config.head_dim, torch.bfloat16)
    return TargetSpec(kv, config.vocab_size, config.hidden_size, config.max_position, target.eos_token_ids)
