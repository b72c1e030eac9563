"""Requests choose how much is drafted for them; neighbours with other budgets in the batch change nothing."""

from __future__ import annotations

import pytest
from engine_helpers import BUSHY, TinyPipeline
from test_dynamic_tree import prompts

from branchline.core import Request
from branchline.engine.models.protocol import Models

pytestmark = pytest.mark.models


@pytest.mark.parametrize("tree", [BUSHY, "chain:5", "dynamic:4,3,12"])
def test_every_budget_gives_the_same_text(tiny: Models, tree: str) -> None:
    texts = prompts(2, 6)
    plain = TinyPipeline(tiny, "none").run_text([Request(str(i), prompt, 30) for i, prompt in enumerate(texts)])
    for shift in range(3):
        budgets = [None, 0, 3, 1, 7, 100]
        requests = [
            Request(str(index), prompt, 30, draft_nodes=budgets[(index + shift) % 6])
            for index, prompt in enumerate(texts)
        ]
        assert TinyPipeline(tiny, tree).run_text(requests, in_flight=3) == plain


def test_a_larger_budget_never_accepts_less(tiny: Models) -> None:
    forwards = []
    for nodes in (0, 2, 16):
        pipeline = TinyPipeline(tiny, BUSHY)
        requests = [Request(str(i), prompt, 40, draft_nodes=nodes) for i, prompt in enumerate(prompts(6, 6))]
        pipeline.run_text(requests)
        forwards.append(pipeline.forwards)
    assert forwards[0] == 6 * 39
    assert forwards[0] > forwards[1] > forwards[2]


def test_requests_without_speculation_cost_no_drafting(tiny: Models) -> None:
    """A batch in which nobody drafts runs the plain iteration."""
    pipeline = TinyPipeline(tiny, BUSHY)
    for index, prompt in enumerate(prompts(6, 3)):
        pipeline.hand_off(Request(str(index), prompt, 20, draft_nodes=0))
    phases: list[str] = []
    plain = pipeline.decode.iteration(0)
    plain.observe = phases.append
    results = pipeline.decode.step().results
    assert phases == ["launch", "verify", "accept", "rewind", "draft"]
    assert [len(result.token_ids) for result in results] == [1, 1, 1]
    assert [result.drafted for result in results] == [0, 0, 0]
