"""`branchline explain`: what is drawn is what the engine did."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from branchline.config import Config
from branchline.core import DraftTree, FinishReason, Request, SamplingParams
from cluster.cli import main
from cluster.tree_view import COLOURED, StepView, draw, to_json, visible

PROMPT = "Why is the sky blue?"
STEPS = 6
#: Sixteen nodes of depth four, so that paths are often not in place.
BUSHY = "[[0],[1],[0,0],[2],[3],[0,1],[1,0],[4],[0,0,0],[5],[0,2],[0,3],[2,0],[0,0,1],[1,1],[0,0,0,0]]"
FLAGS = ["--provider", "reference", "--dtype", "float32"]

WORDS = {7: "the", 1: " cat", 2: " dog", 3: " sat", 4: " is", 5: "\n", 9: " sleeping"}
#: The worked example of docs/engine.md: the path is 0, 1, 4.
EXAMPLE = StepView(
    number=3,
    length=10,
    length_after=13,
    root=7,
    tree=DraftTree((1, 2, 3, 4, 5), (0, 0, 1, 1, 3), (-0.5, -1.5, -1.0, -2.0, -3.0)),
    token_ids=(1, 4, 9),
    finish=None,
)


def test_the_worked_example_is_drawn() -> None:
    assert draw(EXAMPLE, WORDS.__getitem__) == [
        "step 3: 10 tokens in the cache, 5 drafted nodes",
        "  'the'  root, row 10",
        "  ├─● ' cat'  0.607  row 11",
        "  │  ├─○ ' sat'  0.368  row 13",
        "  │  │  └─○ '\\n'  0.050  row 15",
        "  │  └─● ' is'  0.135  row 14 -> 12",
        "  │     └─★ ' sleeping'  bonus",
        "  └─○ ' dog'  0.223  row 12",
        "  rewind: rows 10, 11, 14 -> 10, 11, 12; length 10 -> 13",
        "  emitted 3: ' cat', ' is', ' sleeping'",
    ]
    coloured = "\n".join(draw(EXAMPLE, WORDS.__getitem__, COLOURED))
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == "\n".join(draw(EXAMPLE, WORDS.__getitem__))
    assert coloured.count("\x1b[0m") == 7


def test_the_worked_example_as_json() -> None:
    entry = to_json(EXAMPLE, WORDS.__getitem__)
    assert entry["path"] == [0, 1, 4]
    assert [node["node"] for node in entry["nodes"] if node["accepted"]] == [1, 4]
    assert (entry["rows_before"], entry["rows_after"]) == ([10, 11, 14], [10, 11, 12])
    assert entry["bonus"] == {"token_id": 9, "text": " sleeping"}


def test_a_request_that_ends_inside_the_tree_has_no_bonus() -> None:
    view = StepView(1, 10, 12, 7, EXAMPLE.tree, (1, 4), FinishReason.STOP)
    assert view.bonus is None
    assert "★" not in "\n".join(draw(view, WORDS.__getitem__))
    assert draw(view, WORDS.__getitem__)[-1].endswith("(stop)")


def test_part_of_a_character_is_shown_by_its_id() -> None:
    assert visible("�", 5) == "<token 5>"
    assert visible(" a\n", 6) == r"' a\n'"


def explained(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    assert main(["explain", "--prompt", PROMPT, "--chat", "--steps", str(STEPS), "--json", *FLAGS, *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.models
@pytest.mark.parametrize("tree", [BUSHY, "dynamic:4,4,16", "none"])
@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_what_is_shown_is_what_the_engine_emits(
    capsys: pytest.CaptureFixture[str], tree: str, temperature: str
) -> None:
    *steps, totals = explained(capsys, "--tree", tree, "--temperature", temperature, "--seed", "3")
    assert len(steps) == STEPS
    for before, after in itertools.pairwise(steps):
        assert after["length"] == before["length_after"]
        assert after["root"] == before["tokens"][-1]
    for step in steps:
        nodes = {node["node"]: node for node in step["nodes"]}
        along = [nodes[number] for number in step["path"][1:]]
        assert [node["parent"] for node in along] == step["path"][:-1]
        spelled = [{"token_id": node["token_id"], "text": node["text"]} for node in along]
        assert [*spelled, step["bonus"]] == step["tokens"], "the drawn path spells what was emitted"
        assert step["rows_after"] == [step["length"] + index for index in range(len(step["path"]))]
        assert step["length_after"] == step["length"] + len(step["tokens"])
        probabilities = {0: 1.0} | {number: node["probability"] for number, node in nodes.items()}
        assert all(0 <= node["probability"] <= probabilities[node["parent"]] for node in nodes.values())
    emitted = sum(len(step["tokens"]) for step in steps)
    assert (totals["tokens"], totals["target_forwards"]) == (emitted + 1, STEPS)
    assert totals["drafted"] == sum(len(step["nodes"]) for step in steps)
    assert totals["acceptance_length"] == round(emitted / STEPS, 4)
    if tree != "none" and temperature == "0":
        assert any(step["rows_before"] != step["rows_after"] for step in steps), "no rewind moved anything"
    assert totals["text"] == text_of_pipeline(tree, float(temperature), totals["tokens"])


def text_of_pipeline(tree: str, temperature: float, tokens: int) -> str:
    """The same request through the benchmarks' pipeline; the tokens alone, as a plain server gives them."""
    from transformers import AutoTokenizer

    from branchline.engine.assemble import assemble
    from branchline.engine.models.locate import locate_model
    from branchline.engine.offline import Pipeline
    from branchline.engine.tree_spec import parse_tree

    config = Config().override(**{"model.provider": "reference", "model.dtype": "float32", "engine.max_batch": 1})
    models, _ = assemble(config)
    tokenizer = AutoTokenizer.from_pretrained(locate_model("default"))
    chat = [{"role": "user", "content": PROMPT}]
    prompt = tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    request = Request("0", prompt, tokens, SamplingParams(temperature, seed=3))
    output = Pipeline(models, parse_tree(tree), config.engine).run([request])["0"]
    return str(tokenizer.decode(output.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.models
def test_the_drawing_ends_with_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--prompt", PROMPT, "--chat", "--steps", "2", *FLAGS, "--model", "default"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines), "no colours but on a terminal"
    assert re.match(r"total: \d+ tokens, the first by prefill; \d+ target forwards, acceptance length", lines[-1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere"], "/nowhere: no such directory"),
        (["--tree", "chain:0"], "model.tree: chain:K needs K between 1 and 256, got '0'"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert main(["explain", "--prompt", PROMPT, *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
