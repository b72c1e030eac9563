"""Edits of the logits against doing them by hand, along sequences that advance at their own pace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_helpers import edited_by_hand, request_of, tensors_of

from branchline.core import MAX_BAD_WORDS, MAX_LOGIT_BIASES, InvalidRequestError, Request, SamplingParams
from branchline.engine.logit_edits import EditTensors
from branchline.engine.sampling import SamplingTensors, SamplingVariant

VOCAB = 9
EDITING = SamplingVariant(edits=True)

tokens = st.integers(0, VOCAB - 1)
penalties = st.just(0.0) | st.floats(-2, 2)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    sampling = SamplingParams(
        repetition_penalty=draw(st.just(1.0) | st.floats(0.5, 3)),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        logit_bias=tuple(draw(st.dictionaries(tokens, st.floats(-100, 100), max_size=4)).items()),
        bad_words=tuple(draw(st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=5))),
    )
    return request_of(
        sampling,
        prompt=tuple(draw(st.lists(tokens, min_size=1, max_size=6))),
        emitted=tuple(draw(st.lists(tokens, max_size=9))),
        stop_token_ids=tuple(draw(st.lists(tokens, max_size=3, unique=True))),
        min_tokens=draw(st.integers(0, 12)),
    )


def edits_of(rows: SamplingTensors) -> EditTensors:
    assert rows.edits is not None
    return rows.edits


def apply(request: Request, logits: list[float], first_token: int | None = None) -> list[float]:
    """One row alone."""
    tensors = SamplingTensors.empty(1, len(logits), torch.device("cpu"))
    tensors.load(0, request, first_token)
    return edits_of(tensors).apply(torch.tensor([logits]))[0].tolist()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_edits_are_those_made_by_hand_all_along_the_way(data: st.DataObject) -> None:
    batch = data.draw(st.lists(requests(), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    outputs = [list(request.emitted) for request in batch]
    state = tensors_of(batch, VOCAB)
    slots = torch.tensor([*range(len(batch)), len(batch), len(batch)])  # two of the padding row
    for _ in range(2):  # iterations, of two tokens each
        rows = state.select(slots, EDITING)
        for _ in range(2):
            logits = torch.randn(len(slots), VOCAB, generator=generator) * 4
            edited = edits_of(rows).apply(logits)
            for row, request in enumerate(batch):
                expected = edited_by_hand(logits[row].tolist(), request, outputs[row])
                np.testing.assert_allclose(edited[row].numpy(), expected, rtol=1e-5, atol=1e-4)
            assert torch.equal(edited[len(batch) :], logits[len(batch) :])
            chosen = torch.tensor([*data.draw(st.tuples(*[tokens] * len(batch))), 0, 0])
            keep = torch.tensor([*data.draw(st.tuples(*[st.booleans()] * len(batch))), False, False])
            rows.advance(chosen, keep)
            for row, output in enumerate(outputs):
                if keep[row]:
                    output.append(int(chosen[row]))
        state.store(slots, rows)


@settings(deadline=None, max_examples=40)
@given(requests(), st.lists(requests(), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_a_row_is_edited_alike_alone_and_among_others(request_: Request, others: list[Request], seed: int) -> None:
    logits = torch.randn(len(others) + 2, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    together = edits_of(tensors_of([request_, *others], VOCAB)).apply(logits)
    assert together[0].tolist() == apply(request_, logits[0].tolist())
    assert torch.equal(together[-1], logits[-1])  # the padding row edits nothing


def test_a_plain_request_takes_over_a_row_that_edited_everything() -> None:
    heavy = SamplingParams(
        repetition_penalty=2.0,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        logit_bias=((0, 5.0), (3, -5.0)),
        bad_words=((1,), (2, 3)),
    )
    tensors = SamplingTensors.empty(1, VOCAB, torch.device("cpu"))
    tensors.load(0, request_of(heavy, emitted=(1, 2), stop_token_ids=(5,), min_tokens=50), 4)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(edits_of(tensors).apply(logits), logits)
    tensors.load(0, request_of(stop_token_ids=(5,)), 4)
    assert torch.equal(edits_of(tensors).apply(logits), logits)


def test_a_lighter_request_takes_over_nothing_of_the_one_before() -> None:
    tensors = SamplingTensors.empty(1, 4, torch.device("cpu"))
    words = SamplingParams(bad_words=((3, 1), (2,)), logit_bias=((0, 1.0), (1, 2.0)), presence_penalty=1.0)
    tensors.load(0, request_of(words, emitted=(1, 3), stop_token_ids=(0, 1), min_tokens=9), None)
    light = request_of(SamplingParams(presence_penalty=1.0), prompt=(2,), emitted=(3,), stop_token_ids=(0,))
    tensors.load(0, light, None)
    assert edits_of(tensors).apply(torch.zeros(1, 4)).tolist() == [[0.0, 0.0, 0.0, -1.0]]


def test_the_first_token_counts_as_emitted() -> None:
    request = request_of(SamplingParams(frequency_penalty=1.0, bad_words=((2, 3),)), emitted=(2,))
    assert apply(request, [0.0] * 4) == [0.0, 0.0, -1.0, -math.inf]
    assert apply(request, [0.0] * 4, first_token=2) == [0.0, 0.0, -2.0, -math.inf]
    assert apply(request, [0.0] * 4, first_token=1) == [0.0, -1.0, -1.0, 0.0]


def test_bad_words_match_the_output_alone() -> None:
    words = SamplingParams(bad_words=((2, 3), (1,)))
    assert apply(request_of(words, prompt=(2,)), [0.0] * 4) == [0.0, -math.inf, 0.0, 0.0]
    assert apply(request_of(words, prompt=(0,), emitted=(2,)), [0.0] * 4) == [0.0, -math.inf, 0.0, -math.inf]


def test_the_longest_bad_word_needs_all_of_its_beginning() -> None:
    word = tuple(range(8))
    assert apply(request_of(SamplingParams(bad_words=(word,)), emitted=word[:-1]), [0.0] * 9)[7] == -math.inf
    assert apply(request_of(SamplingParams(bad_words=(word,)), emitted=word[1:-1]), [0.0] * 9)[7] == 0.0


def test_as_many_biases_and_bad_words_as_a_request_may_have() -> None:
    biases = tuple((token_id, token_id / 8 - 9) for token_id in range(MAX_LOGIT_BIASES))
    words = tuple((token_id,) for token_id in range(MAX_BAD_WORDS))
    logits = [0.0] * (MAX_LOGIT_BIASES + 5)
    edited = apply(request_of(SamplingParams(logit_bias=biases, bad_words=words)), logits)
    assert edited[:MAX_BAD_WORDS] == [-math.inf] * MAX_BAD_WORDS
    assert edited[MAX_BAD_WORDS:MAX_LOGIT_BIASES] == [bias for _, bias in biases[MAX_BAD_WORDS:]]
    assert edited[MAX_LOGIT_BIASES:] == [0.0] * 5


def test_bans_that_leave_nothing_are_ignored() -> None:
    everything = SamplingParams(bad_words=((0,), (1,)), logit_bias=((1, 2.0),))
    assert apply(request_of(everything, stop_token_ids=(2,), min_tokens=1), [1.0, 0.0, 0.0]) == [1.0, 2.0, 0.0]
    assert apply(request_of(everything, stop_token_ids=(2,), min_tokens=1), [1.0, 0.0, 0.0, -math.inf])[1] == 2.0
    assert apply(request_of(everything), [1.0, 0.0, 0.0]) == [-math.inf, -math.inf, 0.0]


def test_the_smallest_penalty_keeps_banned_tokens_banned() -> None:
    tiny = SamplingParams(repetition_penalty=1e-60, bad_words=((0,),))
    edited = apply(request_of(tiny, prompt=(0, 1)), [1.0, -2.0, 0.5])
    assert edited[0] == -math.inf
    assert edited[1] == pytest.approx(0.0)
    assert edited[2] == 0.5


def test_stop_tokens_that_the_model_does_not_know_forbid_nothing() -> None:
    assert apply(request_of(stop_token_ids=(1, 77), min_tokens=3), [0.0] * 3) == [0.0, -math.inf, 0.0]


@pytest.mark.parametrize(
    ("sampling", "field"),
    [(SamplingParams(logit_bias=((9, 1.0),)), "logit_bias"), (SamplingParams(bad_words=((1, 9),)), "bad_words")],
)
def test_token_ids_outside_the_vocabulary_are_refused(sampling: SamplingParams, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field}: token id 9"):
        tensors_of([request_of(sampling)], VOCAB)
