"""The budget that brings the most tokens a second is found, and nothing that is tried on the way changes a text."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
from engine_helpers import BUSHY, TinyPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dynamic_tree import prompts

from branchline.core import Request, SamplingParams
from branchline.engine.load_budget import MARGIN, TRIAL, TRIAL_EVERY, LoadBudget
from branchline.engine.models.protocol import Models
from branchline.engine.tree_spec import parse_tree


class Machine:
    """Computes for `row_s` a row, but no less than `read_s`, and `draft_s` for a tree; node n is accepted, after those
    before it, with probability `accept[n - 1]`."""

    def __init__(self, read_s: float, row_s: float, draft_s: float, accept: list[float], seed: int = 0) -> None:
        self.read_s, self.row_s, self.draft_s, self.accept = read_s, row_s, draft_s, accept
        self.random = random.Random(seed)

    def seconds(self, batch: int, nodes: int) -> float:
        return max(self.read_s, batch * (nodes + 1) * self.row_s) + (self.draft_s if nodes else 0.0)

    def tokens(self, nodes: int) -> float:
        return 1 + sum(accumulate(self.accept[:nodes], lambda a, b: a * b))

    def path(self, drafted: int) -> list[int]:
        """A chain, so that acceptance ends at the first miss."""
        path: list[int] = []
        while len(path) < drafted and self.random.random() < self.accept[len(path)]:
            path.append(len(path) + 1)
        return path

    def serve(self, budget: LoadBudget, batch: int, iterations: int) -> list[int]:
        """The budgets that were chosen."""
        chosen, drafted = [], 0
        for _ in range(iterations):
            nodes = budget.choose(batch)
            paths = [(min(drafted, nodes), self.path(min(drafted, nodes))) for _ in range(batch)]
            budget.learn(batch, nodes, self.seconds(batch, nodes) * self.random.uniform(0.98, 1.02), paths)
            chosen.append(nodes)
            drafted = nodes
        return chosen

    def best(self, batch: int, budgets: tuple[int, ...]) -> int:
        return max(budgets, key=lambda nodes: self.tokens(nodes) / self.seconds(batch, nodes))


def settled(chosen: list[int]) -> int:
    """What most of the last iterations ran with."""
    last = chosen[-TRIAL_EVERY:]
    return max(set(last), key=last.count)


def test_a_large_tree_alone_and_a_small_one_or_none_in_a_crowd() -> None:
    machine = Machine(read_s=30.0, row_s=1.5, draft_s=3.0, accept=[0.7, 0.6, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3])
    budget = LoadBudget(8)
    assert budget.budgets == (0, 1, 2, 4, 8)
    for batch in (1, 4, 8, 32, 1):
        assert settled(machine.serve(budget, batch, 4 * TRIAL_EVERY)) == machine.best(batch, budget.budgets), batch
    assert {machine.best(batch, budget.budgets) for batch in (1, 4, 8, 32)} == {8, 4, 2, 0}


def test_it_follows_a_change() -> None:
    accept = [0.8] * 16
    budget = LoadBudget(16)
    fast, slow = Machine(10.0, 0.1, 1.0, accept), Machine(10.0, 5.0, 1.0, accept)
    assert settled(fast.serve(budget, 2, 2 * TRIAL_EVERY)) == fast.best(2, budget.budgets) == 16
    assert settled(slow.serve(budget, 2, 8 * TRIAL_EVERY)) == slow.best(2, budget.budgets) < 4


def test_trials_are_rare() -> None:
    machine = Machine(30.0, 1.5, 3.0, [0.7] * 8)
    budget = LoadBudget(8)
    machine.serve(budget, 4, 2 * TRIAL_EVERY)
    chosen = machine.serve(budget, 4, 10 * TRIAL_EVERY)
    assert sum(nodes != settled(chosen) for nodes in chosen) <= 11 * TRIAL


def test_plain_decoding_is_not_tried_while_trees_pay() -> None:
    """It would leave the draft rows of those that run behind."""
    machine = Machine(30.0, 0.1, 3.0, [0.8] * 8)
    assert 0 not in machine.serve(LoadBudget(8), 1, 10 * TRIAL_EVERY)


@given(
    nodes=st.integers(1, 40),
    batch=st.integers(1, 64),
    row_s=st.floats(0.01, 5.0),
    accept=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_no_neighbour_is_much_better(nodes: int, batch: int, row_s: float, accept: float, seed: int) -> None:
    machine = Machine(20.0, row_s, 2.0, [accept] * nodes, seed)
    budget = LoadBudget(nodes)
    at = budget.budgets.index(settled(machine.serve(budget, batch, 8 * TRIAL_EVERY)))

    def rate(index: int) -> float:
        return machine.tokens(budget.budgets[index]) / machine.seconds(batch, budget.budgets[index])

    neighbours = [rate(index) for index in (at - 1, at + 1) if 0 <= index < len(budget.budgets)]
    assert rate(at) >= max(neighbours) / (MARGIN * 1.15), (budget.budgets[at], neighbours)


class Erratic(LoadBudget):
    """Another budget for each iteration."""

    def __init__(self, nodes: int, seed: int) -> None:
        super().__init__(nodes)
        self._random = random.Random(seed)
        self.accepted = 0

    def choose(self, batch: int) -> int:  # noqa: ARG002
        return self._random.choice(self.budgets)

    def learn(self, batch: int, nodes: int, seconds: float, paths: object) -> None:  # noqa: ARG002
        assert seconds > 0
        assert isinstance(paths, list)
        for drafted, path in paths:
            assert list(path) == sorted(set(path))
            assert all(1 <= node <= drafted <= nodes for node in path)
            self.accepted += len(path)


@pytest.mark.models
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("tree", [BUSHY, "chain:5", "dynamic:4,3,12"])
def test_budgets_that_change_all_the_time_change_no_text(tiny: Models, tree: str, pipelined: bool) -> None:
    def requests() -> list[Request]:
        texts = prompts(3, 8)
        own = [None, 3, None, 0, None, 7, None, None]
        return [
            Request(str(i), prompt, 40, SamplingParams(0.8 * (i % 2), seed=i), draft_nodes=own[i])
            for i, prompt in enumerate(texts)
        ]

    plain = TinyPipeline(tiny, "none").run_text(requests(), in_flight=3)
    for seed in range(3):
        budget = Erratic(parse_tree(tree).num_nodes, seed)
        pipeline = TinyPipeline(tiny, tree, pipelined=pipelined, load_budget=budget)
        assert pipeline.run_text(requests(), in_flight=3) == plain
        assert budget.accepted > 0


@pytest.mark.models
def test_drafting_goes_on_after_plain_iterations(tiny: Models) -> None:
    """Rows that nobody wrote are not looked at, so that acceptance is a cold drafter's, not garbage's."""
    forwards = {}
    for name, plain_from, plain_to in (("always", 0, 0), ("gap", 3, 9)):
        budget = Scripted(16, plain_from, plain_to)
        pipeline = TinyPipeline(tiny, BUSHY, load_budget=budget)
        for index, prompt in enumerate(prompts(6, 4)):
            pipeline.hand_off(Request(str(index), prompt, 60))
        while pipeline.decode.running:
            for result in pipeline.decode.step().results:
                if result.finish:
                    pipeline.decode.release(result.allocation)
        forwards[name] = (budget.iterations, budget.accepted_after)
    assert forwards["gap"][1] > 0
    assert forwards["always"][0] <= forwards["gap"][0]


class Scripted(LoadBudget):
    """The whole tree, but for the iterations from `plain_from` to `plain_to`."""

    def __init__(self, nodes: int, plain_from: int, plain_to: int) -> None:
        super().__init__(nodes)
        self._plain = range(plain_from, plain_to)
        self._after = plain_to + 1
        self.iterations = self.accepted_after = 0

    def choose(self, batch: int) -> int:  # noqa: ARG002
        return 0 if self.iterations in self._plain else self.budgets[-1]

    def learn(self, batch: int, nodes: int, seconds: float, paths: object) -> None:  # noqa: ARG002
        assert isinstance(paths, list)
        if self.iterations >= self._after:
            self.accepted_after += sum(len(path) for _, path in paths)
        self.iterations += 1
