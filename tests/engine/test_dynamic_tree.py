"""Dynamic trees: the drafter chooses their shape, step by step and request by request, and the text stays the same."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import VOCAB, TinyPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import DenseAttention

from branchline.core import DraftTree, Request, SamplingParams
from branchline.engine.models.protocol import Models
from branchline.engine.tree import DynamicTree

pytestmark = pytest.mark.models


@st.composite
def trees(draw: st.DrawFn) -> DynamicTree:
    depth, top_k = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    nodes = draw(st.integers(depth, DynamicTree.candidates_of(depth, top_k)))
    return DynamicTree("dynamic", depth, top_k, nodes)


def prompts(seed: int, count: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()) for length in lengths]


def enumerated(tiny: Models, request: Request, first_token: int, tree: DynamicTree) -> dict[tuple[int, ...], float]:
    """Every path that the tree looks at, with its cumulative log-score; each path by a dense computation of its own."""
    scores: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(tree.depth):
        children: dict[tuple[int, ...], float] = {}
        for path in frontier:
            values = draft_log_probabilities(tiny, (*request.context, first_token), path)
            for token, gained in sorted(values.items(), key=lambda entry: -entry[1])[: tree.top_k]:
                children[(*path, token)] = scores.get(path, 0.0) + gained
        scores |= children
        frontier = sorted(children, key=lambda path: -children[path])[: tree.top_k]
    return scores


@torch.no_grad()
def draft_log_probabilities(tiny: Models, tokens: tuple[int, ...], path: tuple[int, ...]) -> dict[int, float]:
    """What the head thinks of the token behind `tokens` and `path`: one sequence, no cache, no tree."""
    draft = tiny.draft
    assert draft is not None
    context = torch.tensor(tokens[:-1])
    auxiliary = tiny.target.forward(context, torch.arange(len(context)), DenseAttention()).auxiliary
    assert auxiliary is not None
    line, hidden = list(tokens[1:]), draft.fuse(auxiliary)
    for token in (*path, None):
        rows = torch.arange(len(line))
        normed, recurrent = draft.forward(torch.tensor(line), hidden, rows, DenseAttention())
        if token is not None:
            line.append(token)
            hidden = torch.cat([hidden, recurrent[-1:]])
    values = torch.log_softmax(draft.logits(normed[-1:])[0], -1).tolist()
    return dict(zip(draft.target_token_ids.tolist(), values, strict=True))


def paths(tree: DraftTree) -> list[tuple[int, ...]]:
    result: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        result.append((*result[parent], token))
    return result[1:]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), tree=trees())
def test_the_tree_holds_the_likeliest_paths(tiny: Models, seed: int, tree: DynamicTree) -> None:
    request = Request("one", prompts(seed, 1)[0], 40)
    sample = TinyPipeline(tiny, tree).hand_off(request)
    assert len(sample.tree) == tree.num_nodes
    expected = enumerated(tiny, request, sample.first_token, tree)
    best = sorted(expected.values(), reverse=True)[: tree.num_nodes]
    drawn = paths(sample.tree)
    assert len(set(drawn)) == len(drawn)
    assert sample.tree.scores == pytest.approx([expected[path] for path in drawn], abs=1e-4)
    assert sample.tree.scores == pytest.approx(best, abs=1e-4)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    tree=trees(),
    in_flight=st.integers(1, 4),
    temperature=st.sampled_from([0.0, 0.8]),
    block_size=st.sampled_from([1, 3, 16]),
    ship_draft=st.booleans(),
)
def test_text_is_that_of_plain_decoding(
    tiny: Models, seed: int, tree: DynamicTree, in_flight: int, temperature: float, block_size: int, ship_draft: bool
) -> None:
    requests = [
        Request(str(index), prompt, 24, SamplingParams(temperature, seed=seed + index))
        for index, prompt in enumerate(prompts(seed, 5))
    ]
    plain = TinyPipeline(tiny, "none").run_text(requests)
    drafted = TinyPipeline(tiny, tree, block_size=block_size).run_text(requests, in_flight, ship_draft)
    assert drafted == plain


def test_topologies_differ_by_request_and_by_step(tiny: Models) -> None:
    pipeline = TinyPipeline(tiny, "dynamic:4,3,10")
    for index, prompt in enumerate(prompts(11, 3)):
        pipeline.hand_off(Request(str(index), prompt, 40))
    seen = set()
    for _ in range(4):
        seen |= {tuple(row) for row in pipeline.decode.state.tree_parents[:3].tolist()}
        pipeline.decode.step()
    assert len(seen) > 4


def test_a_smaller_budget_takes_the_best_nodes(tiny: Models) -> None:
    (prompt,) = prompts(4, 1)
    whole = TinyPipeline(tiny, "dynamic:4,3,12").hand_off(Request("whole", prompt, 40)).tree
    for nodes in (0, 1, 5, 12, 40):
        pipeline = TinyPipeline(tiny, "dynamic:4,3,12")
        sample = pipeline.hand_off(Request("part", prompt, 40, draft_nodes=nodes))
        assert sample.tree == DraftTree(whole.tokens[:nodes], whole.parents[:nodes], whole.scores[:nodes])
        (result,) = pipeline.decode.step().results
        assert result.drafted == min(nodes, 12)
        (result,) = pipeline.decode.step().results
        assert result.drafted == min(nodes, 12)
