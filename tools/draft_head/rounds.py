"""The runs of an evaluation, a few prompts at a time: between two parts everything is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from branchline.config import EngineConfig
from branchline.core import Request
from branchline.engine.models.protocol import Models
from branchline.engine.offline import Pipeline
from branchline.engine.tree import StaticTree, TreeTopology
from tools.draft_head.foresee import Text, foresee
from tools.draft_head.measure import Meter, Tally
from tools.draft_head.partial import Partial
from tools.draft_head.progress import Progress
from tools.draft_head.questions import Question
from tools.draft_head.recipe import Recipe
from tools.draft_head.report import PLAIN

#: Prompts between two savings, and between two turns of a tree.
PART = 5
#: Prompts that are answered together where nothing is timed.
TOGETHER = 8
#: Tokens of the answers that are not measured, before those that are.
WARM_UP = 16

_PLAIN = StaticTree(PLAIN, ())


@dataclass(frozen=True)
class Rounds:
    """Runs questions with the models at each of the recipe's temperatures."""

    models: Models
    engine: EngineConfig
    recipe: Recipe
    partial: Partial
    say: Callable[[str], None]

    def foresee(self, questions: list[Question]) -> dict[float, list[Text]]:
        """What any static tree would accept of the answers, by temperature."""
        temperatures = self.recipe.evaluate.temperatures
        engine = self._sized(questions, [_PLAIN], TOGETHER)
        parts = [questions[start : start + TOGETHER] for start in range(0, len(questions), TOGETHER)]
        self.say(f"foreseeing the answers to {len(questions)} prompts")
        done = sum(len(part) for each in temperatures for part in parts[: self.partial.foreseen(each)])
        with Progress(len(questions) * len(temperatures), "answers", self.say, done=done) as progress:
            for temperature in temperatures:
                for part in parts[self.partial.foreseen(temperature) :]:
                    requests = self._requests(part, temperature)
                    # A pipeline's caches are freed with it: foreseeing takes room, too.
                    outputs = Pipeline(self.models, _PLAIN, engine).run([each for each, _ in requests], TOGETHER)
                    told = [
                        foresee(self.models, category, request, outputs[request.request_id].token_ids)
                        for request, category in requests
                    ]
                    self.partial.add_texts(temperature, told)
                    progress.add(len(part))
        return {temperature: self.partial.texts(temperature) for temperature in temperatures}

    def measure(self, trees: Mapping[str, TreeTopology], questions: list[Question]) -> dict[tuple[str, float], Tally]:
        """Each tree's tally, by its name and temperature. The trees take turns, part by part, so that whatever disturbs
        the machine for a while disturbs them all."""
        temperatures = self.recipe.evaluate.temperatures
        engine = self._sized(questions, trees.values(), 1)
        parts, each = _parts(questions), len(trees) * len(temperatures)
        self.say(f"measuring {len(trees)} trees with {len(questions)} prompts")
        meters: dict[str, Meter] = {}
        done = each * sum(map(len, parts[: self.partial.measured]))
        with Progress(each * len(questions), "answers", self.say, done=done) as progress:
            for part in parts[self.partial.measured :]:
                if not meters:
                    meters = {name: Meter(self.models, tree, engine) for name, tree in trees.items()}
                    self._warm(meters.values(), part[0])
                found = {}
                for temperature in temperatures:
                    for name, meter in meters.items():
                        found[name, temperature] = meter.measure(self._requests(part, temperature))
                        progress.add(len(part))
                self.partial.add_tallies(found)
        cases = [(name, temperature) for name in trees for temperature in temperatures]
        return {case: self.partial.tally(*case) for case in cases}

    def _warm(self, meters: Iterable[Meter], question: Question) -> None:
        """What is allocated, compiled or captured at first use is there afterwards."""
        for meter in meters:
            for temperature in self.recipe.evaluate.temperatures:
                meter.measure(self._requests([question], temperature, WARM_UP))

    def _requests(
        self, questions: list[Question], temperature: float, most: int | None = None
    ) -> list[tuple[Request, str]]:
        """With their categories. Each question has a seed of its own, so a text is the same with any tree."""
        stop, seed = self.models.target.spec.eos_token_ids, self.recipe.seed
        most = min(most or self.recipe.evaluate.max_tokens, self.recipe.evaluate.max_tokens)
        return [(question.request(most, temperature, seed, stop), question.category) for question in questions]

    def _sized(self, questions: list[Question], trees: Iterable[TreeTopology], batch: int) -> EngineConfig:
        """The engine with caches that hold `batch` of these requests with any of the trees, and little more: the
        trees' engines are all there at once."""
        longest = max(len(question.prompt) for question in questions) + self.recipe.evaluate.max_tokens
        # Behind the tokens: an accepted path or two, and the next tree (engine/sequence.py).
        rows = longest + max(3 * (tree.depth + 1) + tree.num_nodes + tree.draft_rows + 2 for tree in trees)
        blocks = batch * (-(-rows // self.engine.block_size) + 1) + 1
        specs = [self.models.target.spec.kv, *([self.models.draft.spec.kv] if self.models.draft else [])]
        size = blocks * self.engine.block_size * sum(kv.bytes_per_token for kv in specs)
        return dataclasses.replace(self.engine, max_batch=batch, max_model_len=longest, kv_cache_mib=-(-size // 2**20))


def _parts(questions: list[Question]) -> list[list[Question]]:
    return [questions[start : start + PART] for start in range(0, len(questions), PART)]
