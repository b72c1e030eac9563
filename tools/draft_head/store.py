"""The work directory: where each stage puts what it makes. A file appears whole or not at all, so a stage that was
stopped goes on from the files that are there."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from branchline.config import ConfigError
from tools.draft_head.recipe import Recipe, dump, fixed_difference, load

#: What a stage leaves first; while there is none, its section of the recipe may still change.
_TRACES = {"data": "data/*.jsonl.gz", "features": "features/*.safetensors", "train": "train/checkpoint.pt"}


@dataclass(frozen=True)
class Conversation:
    """Token ids: `prompt` up to and with the assistant's last header, `answer` with the stop token if it came. Of the
    prompt the model wrote what begins at `begun`; all from there on is learned from."""

    id: int
    kind: str
    temperature: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    begun: int

    def __post_init__(self) -> None:
        assert 1 <= self.begun <= len(self.prompt), self.id
        assert self.answer, self.id

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def learned(self) -> int:
        """Tokens that are learned from."""
        return len(self) - self.begun


@dataclass(frozen=True)
class Work:
    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def vocabulary(self) -> Path:
        return self.root / "vocabulary.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.root / "train" / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.root / "train" / "log.jsonl"

    @property
    def head(self) -> Path:
        return self.root / "head"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    def data_shard(self, index: int) -> Path:
        return self.data / f"{index:05d}.jsonl.gz"

    def feature_shard(self, data_shard: Path) -> Path:
        """The features of a data shard."""
        return self.features / f"{data_shard.name.removesuffix('.jsonl.gz')}.safetensors"

    def data_shards(self) -> list[Path]:
        """Those that are there, in order."""
        return sorted(self.data.glob("*.jsonl.gz"))

    def feature_shards(self) -> list[Path]:
        return sorted(self.features.glob("*.safetensors"))

    def open_conversations(self, path: Path) -> Iterator[Conversation]:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                yield Conversation(**entry | {"prompt": tuple(entry["prompt"]), "answer": tuple(entry["answer"])})

    def write_conversations(self, path: Path, conversations: Iterable[Conversation]) -> None:
        lines = "".join(json.dumps(asdict(entry), separators=(",", ":")) + "\n" for entry in conversations)
        with self.writing(path) as temporary:
            # No time of writing in the header: the same conversations give the same bytes.
            temporary.write_bytes(gzip.compress(lines.encode(), mtime=0))

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """A temporary path beside `path`, which takes its place if the block ends well."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        yield temporary
        os.replace(temporary, path)

    def begin(self, recipe: Recipe) -> None:
        """Notes the recipe. Raises ConfigError if something here was made with another one: the field is named."""
        if self.recipe.exists():
            before = load(self.recipe)
            begun = [stage for stage, trace in _TRACES.items() if any(self.root.glob(trace))]
            pairs = [("", before, recipe)] if begun else []
            pairs += [(f"{stage}.", getattr(before, stage), getattr(recipe, stage)) for stage in begun]
            for path, ours, theirs in pairs:
                if difference := fixed_difference(ours, theirs, path):
                    raise ConfigError(f"{self.root} was begun with {difference}; take another directory")
        with self.writing(self.recipe) as temporary:
            temporary.write_text(dump(recipe), encoding="utf-8")
