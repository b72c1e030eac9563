from __future__ import annotations

import struct
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchline.core import (
    DraftTree,
    Fingerprint,
    FinishReason,
    InvalidRequestError,
    Request,
    SamplingParams,
    SpeculationStats,
    TokenLogprobs,
)
from branchline.v1 import decode_pb2, types_pb2
from branchline.wire import convert

Message = TypeVar("Message", types_pb2.Request, decode_pb2.DraftFrame)

ids = st.integers(0, 2**32 - 1)
id_lists = st.lists(ids, max_size=20).map(tuple)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.integers(0, 2**63 - 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100), max_size=5).map(lambda biases: tuple(biases.items())),
    bad_words=st.lists(st.lists(ids, min_size=1, max_size=8).map(tuple), max_size=4).map(tuple),
    sample_index=st.integers(0, 15),
)
logprobs = st.builds(
    TokenLogprobs,
    st.floats(max_value=0, width=32),
    st.lists(st.tuples(ids, st.floats(max_value=0, width=32)), max_size=20).map(tuple),
)
requests = st.builds(
    Request,
    request_id=st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])),
    prompt=st.lists(ids, min_size=1, max_size=20).map(tuple),
    max_tokens=st.integers(21, 2**32 - 1),
    sampling=samplings,
    emitted=id_lists,
    stop_token_ids=st.lists(ids, max_size=8).map(tuple),
    min_tokens=st.integers(0, 21),
    logprobs=st.none() | st.integers(0, 20),
    draft_nodes=st.none() | st.integers(0, 2**32 - 1),
)


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    size = draw(st.integers(0, 24))
    return DraftTree(
        tokens=tuple(draw(ids) for _ in range(size)),
        parents=tuple(draw(st.integers(0, index)) for index in range(size)),
        scores=tuple(draw(st.floats(max_value=0, width=32)) for _ in range(size)),
    )


def on_the_wire(message: Message) -> Message:
    return type(message).FromString(message.SerializeToString())


@given(requests)
def test_a_request_survives_the_wire(request: Request) -> None:
    assert convert.request_from_proto(on_the_wire(convert.request_to_proto(request))) == request


@given(logprobs)
def test_logprobs_survive_the_wire(entry: TokenLogprobs) -> None:
    message = convert.logprobs_to_proto(entry)
    assert convert.logprobs_from_proto(type(message).FromString(message.SerializeToString())) == entry


@given(trees(), ids, ids)
def test_a_tree_survives_the_wire(tree: DraftTree, index: int, first_token: int) -> None:
    frame = on_the_wire(convert.tree_to_proto(tree, index=index, first_token=first_token))
    assert convert.tree_from_proto(frame) == tree
    assert (frame.index, frame.first_token) == (index, first_token)


@given(st.dictionaries(st.text("abc"), st.text("xyz"), min_size=1), st.text("def"))
def test_a_fingerprint_survives_the_wire(target: dict[str, str], draft: str) -> None:
    fingerprint = Fingerprint(target, draft)
    assert convert.fingerprint_from_proto(convert.fingerprint_to_proto(fingerprint)) == fingerprint


@given(st.builds(SpeculationStats, *[st.integers(0, 2**64 - 1)] * 3))
def test_speculation_survives_the_wire(stats: SpeculationStats) -> None:
    assert convert.speculation_from_proto(convert.speculation_to_proto(stats)) == stats


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_a_finish_reason_survives_the_wire(reason: FinishReason | None) -> None:
    assert convert.finish_reason_from_proto(convert.finish_reason_to_proto(reason)) is reason


def valid() -> types_pb2.Request:
    return convert.request_to_proto(Request(request_id="r", prompt=(1, 2), max_tokens=4, emitted=(3,)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("request_id", "", "request_id"),
        ("prompt", [], "prompt is empty"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 1, "emitted already"),
        ("stop_token_ids", range(9), "stop token ids"),
    ],
)
def test_a_wrong_request_is_refused_by_name(field: str, value: object, message: str) -> None:
    request = valid()
    request.ClearField(field)  # type: ignore[arg-type]
    request.MergeFrom(types_pb2.Request(**{field: value}))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=message):
        convert.request_from_proto(request)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", float("nan")),
        ("top_k", 2**31),
        ("seed", 2**63),
    ],
)
def test_wrong_sampling_is_refused_by_name(field: str, value: float) -> None:
    request = valid()
    setattr(request.sampling, field, value)
    with pytest.raises(InvalidRequestError, match=field):
        convert.request_from_proto(request)


def test_sampling_must_be_explicit() -> None:
    request = valid()
    request.ClearField("sampling")
    with pytest.raises(InvalidRequestError, match="sampling is missing"):
        convert.request_from_proto(request)


@pytest.mark.parametrize(
    ("tokens", "parents", "scores"),
    [
        ([1], [0], []),
        ([1, 2], [0], [0.0, 0.0]),
        ([1], [1], [0.0]),  # its own parent
        ([1, 2], [0, 3], [0.0, 0.0]),
        ([1], [0], [struct.unpack("<f", b"\x00\x00\xc0\x7f")[0]]),  # NaN
    ],
)
def test_a_malformed_tree_is_refused(tokens: list[int], parents: list[int], scores: list[float]) -> None:
    frame = decode_pb2.DraftFrame(tree_tokens=tokens, tree_parents=parents, tree_scores=scores)
    with pytest.raises(InvalidRequestError):
        convert.tree_from_proto(frame)


def test_an_empty_fingerprint_matches_nothing() -> None:
    with pytest.raises(InvalidRequestError, match="fingerprint"):
        convert.fingerprint_from_proto(types_pb2.Fingerprint())


def test_an_unknown_finish_reason_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="99"):
        convert.finish_reason_from_proto(99)  # type: ignore[arg-type]
