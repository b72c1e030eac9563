"""Speculation changes the speed and nothing else: token-exact against independent code, in float32."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import BUSHY, VOCAB, TinyPipeline, random_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from branchline.core import FinishReason, Request, SamplingParams
from branchline.engine import iteration
from branchline.engine.cache import PagedKvCache
from branchline.engine.models.protocol import Models
from branchline.engine.tree import TreeTopology

pytestmark = pytest.mark.models

#: Two candidates closer than this may swap places by rounding; none of the tiny model's come near it by chance.
TIE = 1e-4


def greedy(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


def agrees(model: PreTrainedModel, prompt: tuple[int, ...], tokens: list[int]) -> bool:
    """Whether each token is the oracle's first choice after those before it, ties aside."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((logits.amax(1) - chosen < TIE).all())


def prompts(generator: torch.Generator, count: int, longest: int = 40) -> list[tuple[int, ...]]:
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()) for length in lengths]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    drafted=st.sampled_from([0, 1, 2, 5, 16, 70]),
    in_flight=st.integers(1, 5),
    block_size=st.sampled_from([1, 3, 4, 16]),
    chunk=st.sampled_from([1, 5, 64]),
    ship_draft=st.booleans(),
)
def test_greedy_text_is_the_oracles(
    tiny: Models,
    tiny_oracle: PreTrainedModel,
    seed: int,
    drafted: int,
    in_flight: int,
    block_size: int,
    chunk: int,
    ship_draft: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pipeline = TinyPipeline(
        tiny, random_tree(generator, drafted), block_size=block_size, prefill_chunk_tokens=chunk, max_batch=5
    )
    lengths = torch.randint(1, 30, (6,), generator=generator).tolist()
    requests = [
        Request(str(index), prompt, lengths[index]) for index, prompt in enumerate(prompts(generator, len(lengths)))
    ]
    outputs = pipeline.run_text(requests, in_flight, ship_draft)
    for request in requests:
        tokens = outputs[request.request_id]
        assert len(tokens) == request.max_tokens
        assert agrees(tiny_oracle, request.prompt, tokens)


def test_greedy_text_equals_generate(tiny: Models, tiny_oracle: PreTrainedModel) -> None:
    requests = [
        Request(str(index), prompt, 40) for index, prompt in enumerate(prompts(torch.Generator().manual_seed(5), 8))
    ]
    pipeline = TinyPipeline(tiny, BUSHY)
    outputs = pipeline.run_text(requests, in_flight=4)
    for request in requests:
        assert outputs[request.request_id] == greedy(tiny_oracle, request.prompt, 40)
    assert pipeline.forwards < 0.8 * 8 * 39, "the tiny head accepts too little to test anything"


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([1.0, 0.8]),
    drafted=st.sampled_from([1, 6, 20]),
)
def test_sampled_text_is_the_same_with_any_tree_and_batch(
    tiny: Models, seed: int, temperature: float, top_k: int, top_p: float, drafted: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    requests = [
        Request(str(index), prompt, 20, SamplingParams(temperature, top_p, top_k, seed + index))
        for index, prompt in enumerate(prompts(generator, 4))
    ]
    requests.append(Request("greedy", requests[0].prompt, 20))
    plain = TinyPipeline(tiny, "none").run_text(requests)
    assert TinyPipeline(tiny, random_tree(generator, drafted)).run_text(requests, in_flight=4) == plain
    assert TinyPipeline(tiny, random_tree(generator, drafted)).run_text(requests, ship_draft=False) == plain


def test_a_failover_goes_on_with_the_same_text(tiny: Models) -> None:
    whole = Request("whole", (1, 2, 3), 30, SamplingParams(1.0, seed=9))
    text = TinyPipeline(tiny, BUSHY).run_text([whole])["whole"]
    for cut in (1, 7, 29):
        rest = Request("rest", (1, 2, 3), 30, SamplingParams(1.0, seed=9), emitted=tuple(text[:cut]))
        assert TinyPipeline(tiny, "chain:4").run_text([rest])["rest"] == text[cut:]


def _no_mask(parents: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    depths, ancestors = REAL_TOPOLOGY(parents, depth)
    return depths, torch.ones_like(ancestors).tril()


def _no_depths(parents: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    depths, ancestors = REAL_TOPOLOGY(parents, depth)
    return torch.arange(depths.shape[1]).expand_as(depths).clamp(max=depth), ancestors


REAL_TOPOLOGY = iteration.topology_tensors


@pytest.mark.parametrize("broken", ["mask", "depths", "rewind"])
def test_each_piece_matters(
    tiny: Models, tiny_oracle: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Without the tree mask, the depth positions or the moved rows, the text goes wrong."""
    requests = [
        Request(str(index), prompt, 40) for index, prompt in enumerate(prompts(torch.Generator().manual_seed(5), 8))
    ]
    pipeline = TinyPipeline(tiny, BUSHY)
    if broken == "mask":
        monkeypatch.setattr(iteration, "topology_tensors", _no_mask)
    elif broken == "depths":
        monkeypatch.setattr(iteration, "topology_tensors", _no_depths)
    else:
        monkeypatch.setattr(PagedKvCache, "move", lambda *_: None)
    outputs = pipeline.run_text(requests)
    assert not all(agrees(tiny_oracle, request.prompt, outputs[request.request_id]) for request in requests)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.0, 1.0]))
def test_a_superset_tree_accepts_at_least_as_much(tiny: Models, seed: int, temperature: float) -> None:
    """Teacher-forced at every position of the same text, the first step after a hand-off."""
    generator = torch.Generator().manual_seed(seed)
    large = random_tree(generator, 14)
    small = type(large)("subset", large.choices[:5])
    prompt = prompts(generator, 1)[0]
    sampling = SamplingParams(temperature, seed=seed)
    text = TinyPipeline(tiny, "none").run_text([Request("text", prompt, 20, sampling)])["text"]
    accepted = {tree.spec: accepted_by_position(tiny, tree, prompt, text, sampling) for tree in (small, large)}
    assert all(more >= less for less, more in zip(accepted["subset"], accepted["random"], strict=True))


def accepted_by_position(
    models: Models, tree: TreeTopology, prompt: tuple[int, ...], text: list[int], sampling: SamplingParams
) -> list[int]:
    pipeline = TinyPipeline(models, tree)
    lengths = []
    for position in range(len(text) - 1):
        request = Request("position", prompt, 64, sampling, emitted=tuple(text[:position]))
        sample = pipeline.hand_off(request)
        assert sample.first_token == text[position]
        (result,) = pipeline.decode.step().results
        lengths.append(len(result.token_ids))
        pipeline.decode.release(sample.allocation)
    return lengths


@pytest.mark.parametrize("tree", ["chain:1", "[[0]]", "[[0],[1],[2],[3]]", "chain:12", "chain:40"])
def test_extreme_trees(tiny: Models, tiny_oracle: PreTrainedModel, tree: str) -> None:
    prompt = (3, 1, 4, 1, 5)
    pipeline = TinyPipeline(tiny, tree)
    tokens = pipeline.run_text([Request("one", prompt, 50)])["one"]
    assert tokens == greedy(tiny_oracle, prompt, 50)


def test_generation_ends_at_a_stop_token_within_an_accepted_path(tiny: Models) -> None:
    prompt = (3, 1, 4)
    text = TinyPipeline(tiny, "none").run_text([Request("text", prompt, 30)])["text"]
    for tree in ("none", BUSHY):
        for stop in set(text):
            (tokens,) = (
                TinyPipeline(tiny, tree).run_text([Request("text", prompt, 30, stop_token_ids=(11, stop))]).values()
            )
            expected = text[: min(text.index(token) for token in {11, stop} if token in text) + 1]
            assert tokens == expected


def test_generation_ends_at_the_context_limit(tiny: Models, tiny_oracle: PreTrainedModel) -> None:
    limit = tiny.target.spec.max_position
    prompt = tuple(index % VOCAB for index in range(limit - 10))
    for tree in ("none", BUSHY):
        pipeline = TinyPipeline(tiny, tree)
        tokens = pipeline.run_text([Request("long", prompt, 1000)])["long"]
        assert len(tokens) == 10
        assert agrees(tiny_oracle, prompt, tokens)


def test_the_reason_for_the_end_is_reported(tiny: Models) -> None:
    text = TinyPipeline(tiny, "none").run_text([Request("text", (3, 1, 4), 30)])["text"]
    last_to_appear = max(set(text), key=text.index)
    assert text.index(last_to_appear) > 0
    pipeline = TinyPipeline(tiny, "chain:2")
    reasons = []
    for stop in ((), (last_to_appear,)):
        sample = pipeline.hand_off(Request("r", (3, 1, 4), 30, stop_token_ids=stop))
        finish = None
        while finish is None:
            (result,) = pipeline.decode.step().results
            finish = result.finish
        reasons.append(finish)
        pipeline.decode.release(sample.allocation)
    assert reasons[0] is FinishReason.LENGTH
    assert reasons[1] is FinishReason.STOP
