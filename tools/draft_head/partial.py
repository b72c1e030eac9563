"""What an evaluation has found so far, in a file, so that a stopped one goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from branchline.config import CORES_TO_SHARE_OUT, EngineConfig
from tools.draft_head.foresee import Text
from tools.draft_head.measure import Tally
from tools.draft_head.recipe import Recipe, plain
from tools.draft_head.store import Work

#: In the work directory.
PARTIAL = "evaluation.partial.json"
#: Raised when an evaluation gets other fields: an older one is made anew, not misread.
FORMAT = 2


def key_of(work: Work, recipe: Recipe) -> dict[str, Any]:
    """What an evaluation is of: the head, and everything that its figures depend on but for the machine."""
    names = ("config.json", "model.safetensors")
    return {
        "format": FORMAT,
        "head": {name: hashlib.sha256((work.head / name).read_bytes()).hexdigest() for name in names},
        "settings": plain(recipe.evaluate),
        "threads": decode_threads(recipe),
    } | {name: getattr(recipe, name) for name in ("seed", "model", "provider", "device", "dtype")}


def decode_threads(recipe: Recipe) -> int:
    """As many as a decode worker takes on this machine, since the default tree is for it; the recipe's, if it says."""
    cores = len(os.sched_getaffinity(0))
    return recipe.threads or EngineConfig().threads_for("decode", cores, shared=cores < CORES_TO_SHARE_OUT)


class Partial:
    """Texts and tallies, saved with each addition. A file of another key is left out of account."""

    def __init__(self, work: Work, key: Mapping[str, Any]) -> None:
        self._work = work
        self._path = path = work.root / PARTIAL
        self._content: dict[str, Any] = {"key": dict(key), "texts": {}, "measured": 0, "tallies": {}}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] == self._content["key"]:
                self._content = content

    def foreseen(self, temperature: float) -> int:
        """Parts whose answers have been foreseen."""
        return int(self._content["texts"].get(str(temperature), {"parts": 0})["parts"])

    def texts(self, temperature: float) -> list[Text]:
        entry = self._content["texts"].get(str(temperature), {"told": []})
        return [Text(told["category"], tuple(map(tuple, told["places"]))) for told in entry["told"]]

    def add_texts(self, temperature: float, texts: Iterable[Text]) -> None:
        """A part's."""
        entry = self._content["texts"].setdefault(str(temperature), {"parts": 0, "told": []})
        entry["parts"] += 1
        entry["told"] += [asdict(text) for text in texts]
        self._save()

    @property
    def measured(self) -> int:
        """Parts that have been measured with every tree."""
        return int(self._content["measured"])

    def tally(self, tree: str, temperature: float) -> Tally:
        entry = self._content["tallies"].get(f"{tree} at {temperature}")
        if entry is None:
            return Tally()
        categories = {name: (forwards, accepted) for name, (forwards, accepted) in entry["categories"].items()}
        return Tally(**entry | {"lengths": tuple(entry["lengths"]), "categories": categories})

    def add_tallies(self, found: Mapping[tuple[str, float], Tally]) -> None:
        """A part's, of every tree."""
        for (tree, temperature), tally in found.items():
            self._content["tallies"][f"{tree} at {temperature}"] = asdict(self.tally(tree, temperature) + tally)
        self._content["measured"] += 1
        self._save()

    def remove(self) -> None:
        """To be called when the evaluation is whole."""
        self._path.unlink()

    def _save(self) -> None:
        with self._work.writing(self._path) as temporary:
            temporary.write_text(json.dumps(self._content), encoding="utf-8")
