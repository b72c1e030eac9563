"""Choosing a token: the same alone and in any batch, traced or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_helpers import choose, request_of, tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from branchline.core import MAX_LOGPROBS, Request, SamplingParams
from branchline.engine.filters import Filter
from branchline.engine.sampling import SamplingTensors, SamplingVariant, choose_token, draft_scores, token_logprobs

GREEDY = request_of()
DRAWN = request_of(SamplingParams(0.9, seed=4))
FILTERED = request_of(SamplingParams(1.2, top_p=0.9, top_k=20, min_p=0.01, seed=5, sample_index=3))
EDITED = request_of(SamplingParams(repetition_penalty=1.4, logit_bias=((2, 3.0),)), prompt=(0, 1), emitted=(3,))
EVERYTHING = request_of(
    SamplingParams(0.7, top_p=0.8, frequency_penalty=0.5, presence_penalty=-0.2, bad_words=((1,), (3, 4)), seed=6),
    emitted=(4, 3),
    stop_token_ids=(0, 2),
    min_tokens=4,
)
KINDS = [GREEDY, DRAWN, FILTERED, EDITED, EVERYTHING]
ALL_FILTERS = Filter.MIN_P | Filter.TOP_K | Filter.TOP_P
VARIANTS = [
    SamplingVariant(noise, filters, edits)
    for edits in (False, True)
    for noise, filters in ((False, Filter.NONE), (True, Filter.NONE), (True, Filter.MIN_P), (True, ALL_FILTERS))
]


def test_a_batch_pays_for_what_it_needs() -> None:
    assert SamplingVariant.of([]) == SamplingVariant.of([GREEDY]) == SamplingVariant()
    assert SamplingVariant.of([GREEDY, DRAWN]) == SamplingVariant(noise=True)
    assert SamplingVariant.of([FILTERED]) == SamplingVariant(noise=True, filters=ALL_FILTERS)
    assert SamplingVariant.of([DRAWN, EDITED]) == SamplingVariant(noise=True, edits=True)
    assert SamplingVariant.of(iter([DRAWN, EVERYTHING])) == SamplingVariant(True, Filter.TOP_P, edits=True)
    assert SamplingVariant.of([request_of(SamplingParams(top_k=5, top_p=0.5, min_p=0.1))]) == SamplingVariant()
    assert SamplingVariant.of([GREEDY, request_of(logprobs=0)]) == SamplingVariant(logprobs=True)


@pytest.mark.parametrize(
    "request_",
    [
        request_of(SamplingParams(logit_bias=((1, 1.0),))),
        request_of(SamplingParams(bad_words=((1,),))),
        request_of(SamplingParams(repetition_penalty=0.9)),
        request_of(SamplingParams(presence_penalty=-0.1)),
        request_of(SamplingParams(frequency_penalty=0.1)),
        request_of(min_tokens=1),
    ],
)
def test_every_edit_asks_for_edits(request_: Request) -> None:
    assert SamplingVariant.of([request_]) == SamplingVariant(edits=True)


def test_greedy_is_the_first_of_the_largest() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    assert choose(logits, [GREEDY], [7]).tolist() == [1]
    assert choose(logits.bfloat16(), [GREEDY], [7]).tolist() == [1]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    st.sampled_from([5, 16, 33, 1001]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**32 - 1),
)
def test_a_row_chooses_the_same_alone_and_in_any_batch(
    requests: list[Request], vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    """Alone it also goes through the cheapest variant for itself."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(requests), vocab_size, generator=generator) * 3).to(dtype)
    positions = torch.randint(1000, (len(requests),), generator=generator).tolist()
    together = choose(logits, requests, positions)
    alone = [
        choose(logits[row : row + 1], [request], positions[row : row + 1])[0].item()
        for row, request in enumerate(requests)
    ]
    assert together.tolist() == alone


def test_samples_seeds_and_positions_choose_differently() -> None:
    logits = torch.zeros(1, 100_000)
    requests = [request_of(SamplingParams(1.0, seed=seed, sample_index=sample)) for seed in (0, 1) for sample in (0, 1)]
    chosen = {choose(logits, [request], [position]).item() for request in requests for position in range(3)}
    assert len(chosen) == 12


def test_the_lowest_temperature_is_nearly_greedy() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 5
    for temperature in (1e-300, 1e-3):
        assert choose(logits, [request_of(SamplingParams(temperature, top_p=0.9))], [0]) == logits.argmax(-1)


def test_progress_is_kept_where_it_was_selected_from() -> None:
    state = tensors_of([GREEDY, EVERYTHING], 8)
    variant = SamplingVariant.of([EVERYTHING])
    slots = torch.tensor([1, 2, 2])
    rows = state.select(slots, variant)
    rows.advance(torch.tensor([6, 0, 0]), torch.tensor([True, False, False]))
    state.store(slots, rows)
    fresh = tensors_of([request_of(EVERYTHING.sampling, emitted=(4, 3, 6))], 8)
    assert state.edits is not None
    assert fresh.edits is not None
    assert torch.equal(state.edits.output_counts[1], fresh.edits.output_counts[0])
    assert torch.equal(state.edits.recent[1], fresh.edits.recent[0])
    assert state.edits.output_length.tolist() == [0, 3, 0]


def test_a_selection_without_edits_leaves_the_vocabulary_alone() -> None:
    state = tensors_of([DRAWN], 8)
    rows = state.select(torch.tensor([0, 1]), SamplingVariant(noise=True))
    assert rows.edits is None
    rows.advance(torch.tensor([1, 2]), torch.tensor([True, True]))
    state.store(torch.tensor([0, 1]), rows)
    assert state.edits is not None
    assert not state.edits.output_counts.any()


class TestDraftScores:
    logits = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(1)) * 2
    positions = torch.tensor([[5, 6, 6, 7]]).expand(3, -1)
    token_ids = torch.arange(0, 80, 2)  # the draft head knows every other token

    def scores(self, *requests: Request) -> torch.Tensor:
        variant = SamplingVariant.of(requests)
        rows = tensors_of(requests, 80).select(torch.arange(len(requests)), variant)
        count = len(requests)
        return draft_scores(self.logits[:count], self.positions[:count], self.token_ids, rows, variant)

    def test_greedy_rows_have_log_probabilities_in_any_batch(self) -> None:
        expected = torch.log_softmax(self.logits, -1)
        assert torch.equal(self.scores(GREEDY), expected[:1])
        assert torch.equal(self.scores(GREEDY, DRAWN, FILTERED)[:1], expected[:1])

    def test_they_are_normalised(self) -> None:
        sums = self.scores(GREEDY, DRAWN, FILTERED).exp().sum(-1)
        torch.testing.assert_close(sums, torch.ones(3, 4))

    def test_the_best_guess_is_what_the_target_would_choose(self) -> None:
        """Were the draft head the target itself, over the same tokens, its best guess would always be accepted."""
        full = torch.full((4, 80), float("-inf"))
        full[:, self.token_ids] = self.logits[0]
        target = choose(full, [DRAWN] * 4, [5, 6, 6, 7])
        assert torch.equal(self.token_ids[self.scores(DRAWN)[0].argmax(-1)], target)


class TestLogprobs:
    @settings(deadline=None, max_examples=40)
    @given(st.sampled_from([5, 20, 333]), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**32 - 1))
    def test_they_are_those_of_float64(self, vocab_size: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(2, 3, vocab_size, generator=generator) * 5).to(dtype)
        token_ids = torch.randint(vocab_size, (2, 3), generator=generator)
        own, ids, top = token_logprobs(logits, token_ids)
        assert (own.dtype, ids.dtype, top.dtype) == (torch.float32, torch.int64, torch.float32)
        assert ids.shape == top.shape == (2, 3, MAX_LOGPROBS)
        exact = torch.log_softmax(logits.double(), -1)
        count = min(MAX_LOGPROBS, vocab_size)
        torch.testing.assert_close(own.double(), exact.gather(2, token_ids[..., None])[..., 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(top[..., :count].double(), exact.topk(count).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exact.gather(2, ids)[..., :count], top[..., :count].double(), rtol=1e-5, atol=1e-5)
        assert (top[..., count:] == float("-inf")).all()

    def test_a_position_reports_the_same_alone_and_among_others(self) -> None:
        logits = torch.randn(3, 4, 1001, generator=torch.Generator().manual_seed(2)) * 3
        token_ids = torch.arange(12).view(3, 4)
        own, ids, top = token_logprobs(logits, token_ids)
        for row in range(3):
            for place in range(4):
                alone = token_logprobs(logits[row, place][None, None], token_ids[row, place][None, None])
                assert torch.equal(alone[0][0, 0], own[row, place])
                assert torch.equal(alone[1][0, 0], ids[row, place])
                assert torch.equal(alone[2][0, 0], top[row, place])


def step(
    logits: torch.Tensor, position: torch.Tensor, state: SamplingTensors, variant: SamplingVariant
) -> torch.Tensor:
    """What an iteration does with the sampling state: two tokens of a walk, written back."""
    slots = torch.arange(logits.shape[0], device=logits.device)
    rows = state.select(slots, variant)
    first = choose_token(logits, position, rows, variant)
    rows.advance(first, first >= 0)
    second = choose_token(logits, position + 1, rows, variant)
    state.store(slots, rows)
    scores = draft_scores(
        logits[:, None], position[:, None], torch.arange(logits.shape[1], device=logits.device), rows, variant
    )
    _, _, top = token_logprobs(logits[:, None], first[:, None])
    return torch.stack([first, second, scores[:, 0].argmax(-1), top[:, 0].argmax(-1)], 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_it_runs_on_tensors_without_data(variant: SamplingVariant) -> None:
    """Whatever reads a value back to the host raises here."""
    with FakeTensorMode():
        state = SamplingTensors.empty(4, 50, torch.device("cpu"))
        logits, position = torch.empty(3, 50), torch.zeros(3, dtype=torch.int64)
        assert step(logits, position, state, variant).shape == (3, 4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_of_it_stays_on_one_device(variant: SamplingVariant) -> None:
    """A tensor made on the CPU by mistake doesn't mix with those of another device."""
    device = torch.device("meta")
    with pytest.raises(RuntimeError, match="expected device"):
        torch.zeros(3, device=device) + torch.zeros(3)
    state = SamplingTensors.empty(4, 50, device)
    logits, position = torch.empty(3, 50, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    assert step(logits, position, state, variant).device == device


@pytest.mark.parametrize("variant", [SamplingVariant.of(KINDS), SamplingVariant()], ids=str)
def test_a_trace_replays_on_other_requests(variant: SamplingVariant) -> None:
    """As a CUDA graph will: nothing of the traced values may stay in it."""
    generator = torch.Generator().manual_seed(8)

    def inputs(requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor, SamplingTensors]:
        logits = torch.randn(len(requests), 60, generator=generator) * 3
        return logits, torch.randint(99, (len(requests),), generator=generator), tensors_of(requests, 60)

    logits, position, state = inputs([GREEDY] * 5)
    graph = make_fx(lambda logits, position: step(logits, position, state, variant))(logits, position)
    for requests in (KINDS, KINDS[::-1]):
        logits, position, fresh = inputs(requests)
        for row, request in enumerate(requests):
            state.load(row, request, None)
        assert torch.equal(graph(logits, position), step(logits, position, fresh, variant))
        for row, request in enumerate(requests):
            if variant.edits and SamplingVariant.of([request]).edits:  # other rows keep no history
                assert state.edits is not None
                assert fresh.edits is not None
                assert torch.equal(state.edits.recent[row], fresh.edits.recent[row])
                assert torch.equal(state.edits.output_counts[row], fresh.edits.output_counts[row])
