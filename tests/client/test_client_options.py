from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from branchline.client import BranchlineError, InvalidRequestError
from branchline.client.options import deadline, generate_request


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
    )
    assert [(message.role, message.content) for message in request.chat.messages] == [("user", "Hi")]
    assert {field.name for field, _ in request.ListFields()} == {
        *("chat", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "stop_token_ids")
    }
    assert request.max_tokens == -1
    assert math.isnan(request.top_p)
    assert list(request.stop) == ["a", "b"]


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
