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
    return field(default=default, metadata={"free": True})


def _at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= low:
            raise ConfigError(f"{name}: must be at least {low:g}, got {value}")


def _temperatures(values: tuple[float, ...]) -> None:
    if not values or min(values) < 0:
        raise ConfigError(f"temperatures: must be one or more numbers, none negative, got {list(values)}")


@dataclass(frozen=True)
class Shares:
    """How the conversations are divided among the kinds (`turns.py`), relative to their sum."""

    chat: float = 2.5
    seeded: float = 4.0
    translate: float = 2.5
    summarize: float = 2.0
    passage_qa: float = 2.0
    question: float = 2.0
    math: float = 2.5
    multi: float = 0.5

    def __post_init__(self) -> None:
        _at_least(0, **dataclasses.asdict(self))


@dataclass(frozen=True)
class DataRecipe:
    #: Tokens that the model is to write; raising it later adds to what is there.
    tokens: int = _free(3_000_000)
    #: Conversations in a file, which is written whole; what a stopped run can lose.
    shard_conversations: int = 512
    #: Conversations that are written at once, by each process.
    in_flight: int = 64
    #: Processes that write, each with its share of the threads.
    processes: int = _free(1)
    #: Answers are sampled at these in turn, so one that is named twice counts twice; 0 is greedy.
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7)
    shares: Shares = Shares()
    max_answer_tokens: int = 144
    max_prompt_tokens: int = 640
    #: Compile the model with vLLM's compiler, where the provider is vllm: faster, after a minute or two.
    compile: bool = _free(False)

    def __post_init__(self) -> None:
        _at_least(1, tokens=self.tokens, shard_conversations=self.shard_conversations, in_flight=self.in_flight)
        _at_least(1, processes=self.processes)
        _at_least(2, max_answer_tokens=self.max_answer_tokens)
        _at_least(16, max_prompt_tokens=self.max_prompt_tokens)
        _temperatures(self.temperatures)
        if not sum(dataclasses.astuple(self.shares)) > 0:
            raise ConfigError("shares: at least one must be above 0")


@dataclass(frozen=True)
class FeaturesRecipe:
    max_tokens_per_pass: int = _free(2048)

    def __post_init__(self) -> None:
        _at_least(1, max_tokens_per_pass=self.max_tokens_per_pass)


@dataclass(frozen=True)
class TrainRecipe:
    draft_vocab: int = 10240
    #: Passes over the data.
    epochs: float = 3.0
    #: Steps of the training-time test: how many tokens ahead the head learns to draft from its own states.
    ttt_steps: int = 4
    #: The weight of a step relative to the step before it.
    ttt_decay: float = 0.8
    learning_rate: float = 5e-4
    #: Of all steps, the part in which the learning rate rises.
    warmup: float = 0.02
    #: Tokens in an optimiser step; docs/draft-heads.md has what larger ones cost.
    batch_tokens: int = 1024
    weight_decay: float = 0.0
    clip: float = 0.5
    #: A head's directory to go on from; empty begins anew.
    start: str = ""
    checkpoint_every_s: float = _free(300.0)
    #: Steps between lines of the log.
    log_every: int = _free(20)

    def __post_init__(self) -> None:
        _at_least(1, draft_vocab=self.draft_vocab, ttt_steps=self.ttt_steps, batch_tokens=self.batch_tokens)
        _at_least(1, log_every=self.log_every)
        _at_least(0, weight_decay=self.weight_decay, warmup=self.warmup, checkpoint_every_s=self.checkpoint_every_s)
        for name in ("epochs", "ttt_decay", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: must be above 0, got {getattr(self, name)}")
        if self.warmup >= 1:
            raise ConfigError(f"warmup: must be below 1, got {self.warmup}")


@dataclass(frozen=True)
class EvaluateRecipe:
    #: A Spec-Bench file.
    prompts: str = "benchmarks/data/spec_bench_dev.jsonl"
    #: Prompts of it, spread evenly over the file, that trees are measured with side by side.
    limit: int = 40
    max_tokens: int = 128
    #: Trees to measure, as `--tree` takes them.
    trees: tuple[str, ...] = ("chain:3", "dynamic:5,4,16", "dynamic:7,16,48")
    #: Nodes for which the best static shape is sought.
    budgets: tuple[int, ...] = (4, 5, 6, 8, 12, 16, 24, 32, 48)
    temperatures: tuple[float, ...] = (0.0, 0.7)
    #: Other prompts, as evenly spread, whose answers tell which shapes are best.
    foreseen: int = 120

    def __post_init__(self) -> None:
        _at_least(1, limit=self.limit, max_tokens=self.max_tokens, foreseen=self.foreseen)
        if self.budgets:
            _at_least(1, budgets=min(self.budgets))
        _temperatures(self.temperatures)


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    #: A directory, a Hugging Face id, or `default`.
    model: str = "default"
    provider: str = _free("vllm")
    device: str = _free("auto")
    dtype: str = "bfloat16"
    #: Compute threads; 0 takes PyTorch's choice.
    threads: int = _free(0)
    data: DataRecipe = DataRecipe()
    features: FeaturesRecipe = FeaturesRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()

    def __post_init__(self) -> None:
        _at_least(0, seed=self.seed, threads=self.threads)
        for name, value, choices in (
            ("provider", self.provider, PROVIDERS),
            ("device", self.device, DEVICES),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in choices:
                raise ConfigError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")


def load(path: Path) -> Recipe:
    """Reads a recipe. Raises ConfigError for a missing file, bad YAML, an unknown field or a wrong value."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    recipe: Recipe = build(Recipe, tree or {})
    return recipe


def dump(recipe: Recipe) -> str:
    """YAML that `load` reads back."""
    import yaml

    return yaml.safe_dump(plain(recipe), sort_keys=False)


def plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, all the way down."""
    if dataclasses.is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def fixed_difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """The first fixed field in which two recipes, or two sections, differ, as `name: ours, not theirs`."""
    for entry in dataclasses.fields(ours):
        one, other, name = getattr(ours, entry.name), getattr(theirs, entry.name), f"{path}{entry.name}"
        if entry.metadata.get("free") or one == other or name in SECTIONS:
            continue
        if dataclasses.is_dataclass(one):
            return fixed_difference(one, other, f"{name}.")
        return f"{name}: {plain(one)!r}, not {plain(other)!r}"
    return None
