from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest

from branchline.client import BranchlineError, GenerateOptions, InvalidRequestError
from branchline.client.options import deadline, generate_request, sampling_request
from branchline.v1 import gateway_pb2


def test_what_is_not_given_is_not_sent() -> None:
    """Defaults are the gateway's."""
    request = generate_request(prompt="Hello")
    assert [field.name for field, _ in request.ListFields()] == ["prompt"]


def test_every_option_is_sent() -> None:
    request = generate_request(
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=-1,
        temperature=0,
        top_p=math.nan,  # wrong, but the gateway is to say so
        top_k=0,
        seed=0,
        stop=["a", "b"],
        ignore_eos=True,
        stop_token_ids=[1, 2],
        min_p=0,
        repetition_penalty=0,
        presence_penalty=-9,
        frequency_penalty=0,
        logit_bias={5: -1.5, np.int64(0): math.nan},  # type: ignore[dict-item]
        bad_words=["x", ""],
        min_tokens=0,
        logprobs=0,
        n=0,
        draft_nodes=0,
        priority=-500,
        session="mine",
    )
    assert [(message.role, message.content) for message in request.chat.messages] == [("user", "Hi")]
    assert {field.name for field, _ in request.ListFields()} == {
        *("chat", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "stop_token_ids"),
        *("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words"),
        *("min_tokens", "logprobs", "n", "draft_nodes", "priority", "session"),
    }
    assert request.max_tokens == -1
    assert math.isnan(request.top_p)
    assert list(request.stop) == ["a", "b"]
    assert [entry.token_id for entry in request.logit_bias] == [5, 0]
    assert request.logit_bias[0].bias == -1.5
    assert math.isnan(request.logit_bias[1].bias)
    assert list(request.bad_words) == ["x", ""]
    assert (request.presence_penalty, request.priority) == (-9, -500)


def test_every_option_is_documented_and_has_a_field() -> None:
    options = {*inspect.signature(sampling_request).parameters, "prompt", "messages", "token_ids"}
    assert options == set(GenerateOptions.__annotations__)
    fields = {field.name for field in gateway_pb2.GenerateRequest.DESCRIPTOR.fields}
    assert options - {"messages"} == fields - {"chat", "received"}  # the latter is what recovery fills in


def test_one_stop_string_needs_no_list() -> None:
    assert list(generate_request(prompt="", stop="END").stop) == ["END"]


def test_an_empty_input_is_still_an_input() -> None:
    """So that the gateway says what is wrong with it."""
    assert generate_request(prompt="").WhichOneof("input") == "prompt"
    assert generate_request(messages=[]).WhichOneof("input") == "chat"
    assert generate_request(token_ids=[]).WhichOneof("input") == "token_ids"


def test_numpy_integers_are_integers() -> None:
    request = generate_request(token_ids=np.array([1, 2]), max_tokens=np.int32(5))  # type: ignore[arg-type]
    assert list(request.token_ids.ids) == [1, 2]
    assert request.max_tokens == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of .* got none"),
        ({"prompt": "a", "token_ids": [1]}, "got prompt and token_ids"),
        ({"prompt": 5}, "prompt: must be a string, got int"),
        ({"prompt": b"bytes"}, "prompt: must be a string, got bytes"),
        ({"prompt": "ab\ud800"}, "prompt: the character at 2 is half of a surrogate pair"),
        ({"prompt": "", "stop": ["ok", "\udfff"]}, "stop: the character at 0"),
        ({"prompt": "", "stop": [1]}, "stop: must be a string"),
        ({"messages": "hello"}, "messages: must be a list"),
        ({"messages": {"role": "user", "content": "x"}}, "messages: must be a list"),
        ({"messages": ["hello"]}, r"messages\[0\]: must have the keys"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: must have the keys"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content: must be a string"),
        ({"token_ids": "12"}, "token_ids: must be a list of integers"),
        ({"token_ids": [1, -1]}, r"token_ids\[1\]: must be between 0 and 4294967295, got -1"),
        ({"token_ids": [2**32]}, r"token_ids\[0\]: must be between"),
        ({"token_ids": [True]}, r"token_ids\[0\]: must be an integer, got True"),
        ({"token_ids": [1.0]}, r"token_ids\[0\]: must be an integer, got 1.0"),
        ({"prompt": "", "max_tokens": 1.5}, "max_tokens: must be an integer"),
        ({"prompt": "", "max_tokens": 2**63}, "max_tokens: must be between"),
        ({"prompt": "", "seed": -1}, "seed: must be between 0 and"),
        ({"prompt": "", "seed": 2**63}, "seed: must be between 0 and"),
        ({"prompt": "", "temperature": "hot"}, "temperature: must be a number, got 'hot'"),
        ({"prompt": "", "top_p": True}, "top_p: must be a number"),
        ({"prompt": "", "temperature": 10**400}, "temperature: must be a number"),
        ({"prompt": "", "ignore_eos": 1}, "ignore_eos: must be True or False"),
        ({"prompt": "", "min_p": "a"}, "min_p: must be a number"),
        ({"prompt": "", "repetition_penalty": True}, "repetition_penalty: must be a number"),
        ({"prompt": "", "presence_penalty": [1]}, "presence_penalty: must be a number"),
        ({"prompt": "", "frequency_penalty": "x"}, "frequency_penalty: must be a number"),
        ({"prompt": "", "logit_bias": [(1, 2.0)]}, "logit_bias: must map token ids to numbers, got list"),
        ({"prompt": "", "logit_bias": {"1": 2.0}}, "logit_bias: a token id: must be an integer, got '1'"),
        ({"prompt": "", "logit_bias": {-1: 2.0}}, "logit_bias: a token id: must be between 0 and 4294967295, got -1"),
        ({"prompt": "", "logit_bias": {7: "high"}}, r"logit_bias\[7\]: must be a number, got 'high'"),
        ({"prompt": "", "bad_words": "word"}, "bad_words: must be a list of strings, got str"),
        ({"prompt": "", "bad_words": [3]}, "bad_words: must be a string, got int"),
        ({"prompt": "", "min_tokens": 1.5}, "min_tokens: must be an integer"),
        ({"prompt": "", "logprobs": True}, "logprobs: must be an integer, got True"),
        ({"prompt": "", "n": 2.0}, "n: must be an integer, got 2.0"),
        ({"prompt": "", "draft_nodes": "none"}, "draft_nodes: must be an integer, got 'none'"),
        ({"prompt": "", "priority": 2**63}, "priority: must be between"),
        ({"prompt": "", "session": 5}, "session: must be a string"),
    ],
)
def test_a_wrong_type_or_shape_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        generate_request(**options)
    assert isinstance(caught.value, BranchlineError)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="max_token"):
        generate_request(prompt="a", max_token=5)  # type: ignore[call-arg]


@pytest.mark.parametrize("timeout", [0, -1, math.inf, math.nan, "soon"])
def test_every_call_has_an_end(timeout: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout"):
        deadline(timeout)
