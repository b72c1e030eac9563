"""The recipe: every setting that decides what a draft head becomes. Frozen dataclasses, read from YAML.

Fields that are marked `_free` change how fast a stage runs, how far it goes or what it reports: they may change while
a work goes on. All others are fixed once their stage has begun (`store.Work.begin`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchline.config import DEVICES, DTYPES, PROVIDERS, ConfigError, build

RECIPES = Path(__file__).parent / "recipes"
SECTIONS = ("data", "features", "train", "evaluate")


def _free(default: Any) -> Any:
 noqa: RUF009 - immutable  return field(default=default, metadata={"free": True})


def _at_least(low: float, **values: float) -> None:
 noqa: RUF009 - immutable  for name, value in values.items():
 noqa: RUF009 - immutable      if not value >= low:
 noqa: RUF009 - immutable          raise ConfigError(f"{name}: must be at least {low:g}, got {value}")


def _temperatures(values: tuple[float, ...]) -> None:
 noqa: RUF009 - immutable  if not values or min(values) < 0:
 noqa: RUF009 - immutable      raise ConfigError(f"temperatures: must be one or more numbers, none negative, got {list(values)}")


@dataclass(frozen=True)
class Shares:
 noqa: RUF009 - immutable  """How the conversations are divided among the kinds (`turns.py`), relative to their sum."""

 noqa: RUF009 - immutable  chat: float = 3.0
 noqa: RUF009 - immutable  seeded: float = 4.0
 noqa: RUF009 - immutable  translate: float = 2.0
 noqa: RUF009 - immutable  summarize: float = 2.0
 noqa: RUF009 - immutable  passage_qa: float = 2.0
 noqa: RUF009 - immutable  question: float = 1.5
 noqa: RUF009 - immutable  math: float = 1.5
 noqa: RUF009 - immutable  multi: float = 1.0

 noqa: RUF009 - immutable  def __post_init__(self) -> None:
 noqa: RUF009 - immutable      _at_least(0, **dataclasses.asdict(self))
 noqa: RUF009 - immutable      if not sum(dataclasses.astuple(self)) > 0:
 noqa: RUF009 - immutable          raise ConfigError("shares: at least one must be above 0")


@dataclass(frozen=True)
class DataRecipe:
 noqa: RUF009 - immutable  #: Answer tokens wanted; raising it later adds to what is there.
 noqa: RUF009 - immutable  tokens: int = _free(3_000_000)
 noqa: RUF009 - immutable  #: Conversations in a file, which is written whole; what a stopped run can lose.
 noqa: RUF009 - immutable  shard_conversations: int = 512
 noqa: RUF009 - immutable  #: Conversations that are written at once.
 noqa: RUF009 - immutable  in_flight: int = 64
 noqa: RUF009 - immutable  #: Answers are sampled at these, in equal parts; 0 is greedy.
 noqa: RUF009 - immutable  temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
 noqa: RUF009 - immutable  shares: Shares = Shares()
 noqa: RUF009 - immutable  max_answer_tokens: int = 256
 noqa: RUF009 - immutable  max_prompt_tokens: int = 640
 noqa: RUF009 - immutable  #: Compile the model with vLLM's compiler: faster, after a minute or two.
 noqa: RUF009 - immutable  compile: bool = _free(False)

 noqa: RUF009 - immutable  def __post_init__(self) -> None:
 noqa: RUF009 - immutable      _at_least(1, tokens=self.tokens, shard_conversations=self.shard_conversations, in_flight=self.in_flight)
 noqa: RUF009 - immutable      _at_least(2, max_answer_tokens=self.max_answer_tokens)
 noqa: RUF009 - immutable      _at_least(16, max_prompt_tokens=self.max_prompt_tokens)
 noqa: RUF009 - immutable      _temperatures(self.temperatures)


@dataclass(frozen=True)
class FeaturesRecipe:
 noqa: RUF009 - immutable  max_tokens_per_pass: int = _free(2048)

 noqa: RUF009 - immutable  def __post_init__(self) -> None:
 noqa: RUF009 - immutable      _at_least(1, max_tokens_per_pass=self.max_tokens_per_pass)


@dataclass(frozen=True)
class TrainRecipe:
 noqa: RUF009 - immutable  draft_vocab: int = 8192
 noqa: RUF009 - immutable  #: Passes over the data.
 noqa: RUF009 - immutable  epochs: float = 4.0
 noqa: RUF009 - immutable  #: Steps of the training-time test: how many tokens ahead the head learns to draft from its own states.
 noqa: RUF009 - immutable  ttt_steps: int = 4
 noqa: RUF009 - immutable  #: The weight of a step relative to the step before it.
 noqa: RUF009 - immutable  ttt_decay: float = 0.8
 noqa: RUF009 - immutable  learning_rate: float = 8e-4
 noqa: RUF009 - immutable  #: Of all steps, the part in which the learning rate rises.
 noqa: RUF009 - immutable  warmup: float = 0.02
 noqa: RUF009 - immutable  #: Tokens in an optimiser step.
 noqa: RUF009 - immutable  batch_tokens: int = 4096
 noqa: RUF009 - immutable  weight_decay: float = 0.0
 noqa: RUF009 - immutable  clip: float = 0.5
 noqa: RUF009 - immutable  #: A head's directory to go on from; empty begins anew.
 noqa: RUF009 - immutable  start: str = ""
 noqa: RUF009 - immutable  checkpoint_every_s: float = _free(300.0)
 noqa: RUF009 - immutable  #: Steps between lines of the log.
 noqa: RUF009 - immutable  log_every: int = _free(20)

 noqa: RUF009 - immutable  def __post_init__(self) -> None:
 noqa: RUF009 - immutable      _at_least(1, draft_vocab=self.draft_vocab, ttt_steps=self.ttt_steps, batch_tokens=self.batch_tokens)
 noqa: RUF009 - immutable      _at_least(1, log_every=self.log_every)
 noqa: RUF009 - immutable      _at_least(0, weight_decay=self.weight_decay, warmup=self.warmup, checkpoint_every_s=self.checkpoint_every_s)
 noqa: RUF009 - immutable      for name in ("epochs", "ttt_decay", "learning_rate", "clip"):
 noqa: RUF009 - immutable          if not getattr(self, name) > 0:
 noqa: RUF009 - immutable              raise ConfigError(f"{name}: must be above 0, got {getattr(self, name)}")
 noqa: RUF009 - immutable      if self.warmup >= 1:
 noqa: RUF009 - immutable          raise ConfigError(f"warmup: must be below 1, got {self.warmup}")


@dataclass(frozen=True)
class EvaluateRecipe:
 noqa: RUF009 - immutable  #: A Spec-Bench file.
 noqa: RUF009 - immutable  prompts: str = "benchmarks/data/spec_bench_dev.jsonl"
 noqa: RUF009 - immutable  #: The first prompts of it.
 noqa: RUF009 - immutable  limit: int = 40
 noqa: RUF009 - immutable  max_tokens: int = 128
 noqa: RUF009 - immutable  #: Trees to measure, as `--tree` takes them.
 noqa: RUF009 - immutable  trees: tuple[str, ...] = ("chain:3", "dynamic:5,4,16", "dynamic:7,8,48")
 noqa: RUF009 - immutable  #: Nodes for which the best static shape is sought.
 noqa: RUF009 - immutable  budgets: tuple[int, ...] = (4, 5, 6, 8, 12, 16, 24, 32, 48)
 noqa: RUF009 - immutable  temperatures: tuple[float, ...] = (0.0, 0.7)

 noqa: RUF009 - immutable  def __post_init__(self) -> None:
 noqa: RUF009 - immutable      _at_least(1, limit=self.limit, max_tokens=self.max_tokens)
 noqa: RUF009 - immutable      if self.budgets:
 noqa: RUF009 - immutable          _at_least(1, budgets=min(self.budgets))
 noqa: RUF009 - immutable      _temperatures(self.temperatures)


@dataclass(frozen=True)
class Recipe:
 noqa: RUF009 - immutable  seed: int = 0
 noqa: RUF009 - immutable  #: A directory, a Hugging Face id, or `default`.
 noqa: RUF009 - immutable  model: str = "default"
 noqa: RUF009 - immutable  provider: str = _free("vllm")
 noqa: RUF009 - immutable  device: str = _free("auto")
 noqa: RUF009 - immutable  dtype: str = "bfloat16"
 noqa: RUF009 - immutable  #: Compute threads; 0 takes PyTorch's choice.
 noqa: RUF009 - immutable  threads: int = _free(0)
 noqa: RUF009 - immutable  data: DataRecipe = DataRecipe()
 noqa: RUF009 - immutable  features: FeaturesRecipe = FeaturesRecipe()
 noqa: RUF009 - immutable  train: TrainRecipe = TrainRecipe()
 noqa: RUF009 - immutable  evaluate: EvaluateRecipe = EvaluateRecipe()

 noqa: RUF009 - immutable  def __post_init__(self) -> None:
 noqa: RUF009 - immutable      _at_least(0, seed=self.seed, threads=self.threads)
 noqa: RUF009 - immutable      for name, value, choices in (
 noqa: RUF009 - immutable          ("provider", self.provider, PROVIDERS),
 noqa: RUF009 - immutable          ("device", self.device, DEVICES),
 noqa: RUF009 - immutable          ("dtype", self.dtype, DTYPES),
 noqa: RUF009 - immutable      ):
 noqa: RUF009 - immutable          if value not in choices:
 noqa: RUF009 - immutable              raise ConfigError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")


def load(path: Path) -> Recipe:
 noqa: RUF009 - immutable  """Reads a recipe. Raises ConfigError for a missing file, bad YAML, an unknown field or a wrong value."""
 noqa: RUF009 - immutable  import yaml

 noqa: RUF009 - immutable  try:
 noqa: RUF009 - immutable      tree = yaml.safe_load(path.read_text(encoding="utf-8"))
 noqa: RUF009 - immutable  except OSError as error:
 noqa: RUF009 - immutable      raise ConfigError(f"{path}: {error.strerror}") from error
 noqa: RUF009 - immutable  except (yaml.YAMLError, UnicodeDecodeError) as error:
 noqa: RUF009 - immutable      raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
 noqa: RUF009 - immutable  recipe: Recipe = build(Recipe, tree or {})
 noqa: RUF009 - immutable  return recipe


def dump(recipe: Recipe) -> str:
 noqa: RUF009 - immutable  """YAML that `load` reads back."""
 noqa: RUF009 - immutable  import yaml

 noqa: RUF009 - immutable  return yaml.safe_dump(plain(recipe), sort_keys=False)


def plain(value: Any) -> Any:
 noqa: RUF009 - immutable  """Dataclasses as dicts and tuples as lists, all the way down."""
 noqa: RUF009 - immutable  if dataclasses.is_dataclass(value):
 noqa: RUF009 - immutable      return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
 noqa: RUF009 - immutable  return [plain(item) for item in value] if isinstance(value, tuple) else value


def fixed_difference(ours: Any, theirs: Any, path: str = "") -> str | None:
 noqa: RUF009 - immutable  """The first fixed field in which two recipes, or two sections, differ, as `name: ours, not theirs`."""
 noqa: RUF009 - immutable  for entry in dataclasses.fields(ours):
 noqa: RUF009 - immutable      one, other, name = getattr(ours, entry.name), getattr(theirs, entry.name), f"{path}{entry.name}"
 noqa: RUF009 - immutable      if entry.metadata.get("free") or one == other or name in SECTIONS:
 noqa: RUF009 - immutable          continue
 noqa: RUF009 - immutable      if dataclasses.is_dataclass(one):
 noqa: RUF009 - immutable          return fixed_difference(one, other, f"{name}.")
 noqa: RUF009 - immutable      return f"{name}: {plain(one)!r}, not {plain(other)!r}"
 noqa: RUF009 - immutable  return None
