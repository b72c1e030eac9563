"""How good a head is: acceptance length and tokens per second by tree, and the best static tree for it.

First it is told from plain decoding's answers what every static tree would accept of them (`foresee.py`), which gives
the best shape for each budget (`shapes.py`); then all trees are measured side by side, one request at a time, in turns
of a few prompts, so that whatever disturbs the machine disturbs all. The tree with the most tokens per second becomes
the head's default.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from branchline.config import Config, ConfigError
from branchline.engine.models.load import load_models
from branchline.engine.models.locate import locate_model
from branchline.engine.tree import StaticTree, TreeTopology
from branchline.engine.tree_spec import TREE_FILE, parse_tree
from tools.draft_head import card, report
from tools.draft_head.foresee import node_counts
from tools.draft_head.partial import Partial, decode_threads, key_of
from tools.draft_head.questions import read_questions
from tools.draft_head.recipe import Recipe
from tools.draft_head.rounds import Rounds
from tools.draft_head.shapes import in_order, probabilities
from tools.draft_head.store import Work

Say = Callable[[str], None]

#: Nodes of the best shape that a head's tree file lists, or more where the recipe measures larger ones.
LISTED = 64


def run(work: Work, recipe: Recipe, say: Say) -> None:
    """Writes evaluation.json, and beside the head its tree, card and checksums. Raises ConfigError without a head."""
    if not (work.head / "model.safetensors").exists():
        raise ConfigError(f"{work.head}: there is no head yet; `export` makes it")
    key = key_of(work, recipe)
    evaluation = _read(work.evaluation)
    if evaluation is None or evaluation["key"] != key:
        partial = Partial(work, key)
        evaluation = {"key": key} | _evaluate(work, recipe, partial, say)
        _write(work, work.evaluation, evaluation)
        partial.remove()
    else:
        say("this head is evaluated already")
    _write(work, work.head / TREE_FILE, report.tree_file(evaluation))
    card.write(work, recipe, evaluation)
    say(report.table(evaluation))
    say(report.verdict(evaluation))


def _evaluate(work: Work, recipe: Recipe, partial: Partial, say: Say) -> dict[str, Any]:
    from benchmarks import machine

    config = Config().override(
        **{
            "model.model": recipe.model,
            "model.draft": str(work.head),
            "model.dtype": recipe.dtype,
            "model.provider": recipe.provider,
            "model.device": recipe.device,
            "engine.threads": decode_threads(recipe),
        }
    )
    model_dir = locate_model(recipe.model, say)
    models = load_models(config.model, config.engine, say)
    assert models.draft is not None
    questions, others = read_questions(recipe, model_dir, models.target.spec.max_position, say)
    trees = _configured(recipe, models.draft.spec.draft_vocab_size)
    rounds = Rounds(models, config.engine, recipe, partial, say)
    texts = rounds.foresee(others)
    order = in_order(probabilities(node_counts(text for told in texts.values() for text in told)))
    found = (StaticTree(f"{report.BEST}{nodes}", order[:nodes]) for nodes in recipe.evaluate.budgets)
    trees |= {tree.spec: tree for tree in found}
    tallies = rounds.measure(trees, questions)
    return {
        "prompts": len(questions),
        "machine": machine.facts(),
        "foreseen": {"prompts": len(others), "runs": report.foreseen(trees, texts)},
        "best": [list(node) for node in order[: max((LISTED, *recipe.evaluate.budgets))]],
        "trees": {name: report.shape(tree) for name, tree in trees.items()},
        "runs": report.runs(tallies, recipe.evaluate.temperatures),
    }


def _configured(recipe: Recipe, known: int) -> dict[str, TreeTopology]:
    """Plain decoding, and the recipe's trees. Raises ConfigError."""
    trees: dict[str, TreeTopology] = {report.PLAIN: StaticTree(report.PLAIN, ())}
    trees |= {text: parse_tree(text) for text in recipe.evaluate.trees}
    for name, tree in trees.items():
        if tree.guesses > known:
            raise ConfigError(f"evaluate.trees: {name} asks for {tree.guesses} guesses, the head knows {known} tokens")
    return trees


def _read(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _write(work: Work, path: Path, value: object) -> None:
    with work.writing(path) as temporary:
        temporary.write_text(report.dumps(value) + "\n", encoding="utf-8")
