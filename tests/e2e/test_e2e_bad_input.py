"""Requests that can never succeed: refused with INVALID_ARGUMENT and the field's name, disturbing nobody."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from e2e_helpers import REQUEST_S, Fleet, Streamed, wait_until, wait_until_idle
from e2e_model import ALPHABET, MAX_LENGTH

from branchline.client import Client, InvalidRequestError
from branchline.v1 import gateway_pb2
from branchline.v1.gateway_pb2 import ChatMessage, ChatMessages, GenerateRequest, TokenIds

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

GENERATE = "/branchline.v1.GatewayService/Generate"
PROMPT: dict[str, Any] = {"prompt": "a bad cab"}
BESIDE: dict[str, Any] = {
    "prompt": "fade a lamb",
    "max_tokens": 1500,
    "ignore_eos": True,
    "temperature": 0.7,
    "seed": 3,
}

#: Options of the SDK, and what the message must begin with.
BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of prompt, messages and token_ids"),
    (PROMPT | {"token_ids": [1]}, "exactly one of prompt, messages and token_ids"),
    ({"prompt": ""}, "prompt: the prompt is empty"),
    ({"prompt": "XYZ"}, "prompt: the prompt is empty"),  # nothing that the tokenizer knows
    ({"prompt": "a" * MAX_LENGTH}, "prompt: the prompt has 2048 tokens"),
    ({"prompt": "a" * 100_000}, "prompt: too long"),
    ({"prompt": "a\ud800"}, "prompt: the character at 1 is half of a surrogate pair"),
    ({"token_ids": []}, "token_ids: the prompt is empty"),
    ({"token_ids": [1] * MAX_LENGTH}, "token_ids: the prompt has 2048 tokens"),
    ({"token_ids": [1, len(ALPHABET)]}, r"token_ids\[1\]: 16 is not below the vocabulary size"),
    ({"token_ids": [1, -1]}, r"token_ids\[1\]: must be between 0"),
    ({"token_ids": [2**32]}, r"token_ids\[0\]: must be between 0"),
    ({"messages": []}, "chat.messages: at least one"),
    ({"messages": [{"role": "", "content": "a"}]}, r"chat.messages\[0\].role"),
    (
        {"messages": [{"role": "wizard", "content": "a"}]},
        "chat: the model's chat template refuses .* role wizard",
    ),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: must have the keys"),
    ({"messages": [{"role": "user", "content": "a" * MAX_LENGTH}]}, "chat: the prompt has"),
    (PROMPT | {"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
    (PROMPT | {"max_tokens": -3}, "max_tokens: must be at least 1, got -3"),
    (PROMPT | {"max_tokens": MAX_LENGTH}, "max_tokens: a prompt of 9 tokens leaves 2039"),
    (PROMPT | {"max_tokens": 2**40}, "max_tokens: this gateway allows at most"),
    (PROMPT | {"max_tokens": 1.5}, "max_tokens: must be an integer"),
    (PROMPT | {"temperature": math.nan}, "temperature must be between 0 and 100, got nan"),
    (PROMPT | {"temperature": math.inf}, "temperature must be"),
    (PROMPT | {"temperature": -0.5}, "temperature must be"),
    (PROMPT | {"temperature": "hot"}, "temperature: must be a number"),
    (PROMPT | {"top_p": 0}, "top_p must be above 0 and at most 1"),
    (PROMPT | {"top_p": 1.5}, "top_p must be"),
    (PROMPT | {"top_p": math.nan}, "top_p must be"),
    (PROMPT | {"top_k": -1}, "top_k must be"),
    (PROMPT | {"top_k": 2**40}, "top_k must be"),
    (PROMPT | {"seed": -1}, "seed: must be between 0"),
    (PROMPT | {"seed": 2**63}, "seed: must be between 0"),
    (PROMPT | {"stop": ["x"] * 17}, "stop: at most 16 strings, got 17"),
    (PROMPT | {"stop": [""]}, r"stop\[0\]: must not be empty"),
    (PROMPT | {"stop": "x" * 1025}, r"stop\[0\]: at most 1024 characters"),
    (PROMPT | {"stop_token_ids": [1, 2, 3, 4, 5]}, "stop_token_ids: at most 4"),
    (PROMPT | {"stop_token_ids": [len(ALPHABET)]}, r"stop_token_ids\[0\]: 16 is not below"),
    (PROMPT | {"timeout": -1.0}, "timeout: must be a positive number"),
]

#: The same mistakes by a client that checks nothing: messages, or the bytes of one.
BAD_MESSAGES: list[tuple[GenerateRequest | bytes, str]] = [
    (GenerateRequest(), "input: one of prompt, chat and token_ids"),
    (GenerateRequest(token_ids=TokenIds(ids=[2**32 - 1])), r"token_ids\[0\]: 4294967295 is not below"),
    (GenerateRequest(prompt="a", max_tokens=-(2**63)), "max_tokens: must be at least 1"),
    (GenerateRequest(prompt="a", temperature=math.nan), "temperature must be"),
    (GenerateRequest(prompt="a", temperature=-1), "temperature must be"),
    (GenerateRequest(prompt="a", top_p=0), "top_p must be"),
    (GenerateRequest(prompt="a", top_k=-1), "top_k must be"),
    (GenerateRequest(prompt="a", seed=2**64 - 1), "seed must be"),
    (GenerateRequest(prompt="a", stop=["x"] * 1000), "stop: at most 16 strings, got 1000"),
    (GenerateRequest(chat=ChatMessages()), "chat.messages: at least one"),
    (GenerateRequest(chat=ChatMessages(messages=[ChatMessage(content="a")])), r"chat.messages\[0\].role"),
    (b"\x0a\x03a\xff\xfe", "not a valid message: it is damaged, or a string in it is not UTF-8"),  # field 1, 3 bytes
    (b"\x4a\x01\xff\x0a\x01a", "a string in it is not UTF-8"),  # `stop`, then a fine prompt
    (b"\x0a\x7fcut", "not a valid message"),  # 127 bytes are announced, 3 are there
    (b"\xff" * 40, "not a valid message"),
]


def test_bad_requests_are_refused_and_disturb_nobody(one_of_each: Fleet, subtests: pytest.Subtests) -> None:
    client = one_of_each.client
    undisturbed = client.complete(**BESIDE)
    with running_beside(client) as (stream, ended), grpc.insecure_channel(client.target) as channel:
        for options, message in BAD_OPTIONS:
            given = {name: str(value)[:40] for name, value in options.items()}
            with subtests.test(options=given), pytest.raises(InvalidRequestError, match=f"^{message}"):
                client.complete(**options)
        for request, message in BAD_MESSAGES:
            data = request if isinstance(request, bytes) else request.SerializeToString()
            with subtests.test(message=data[:40]):
                with pytest.raises(grpc.RpcError, match=message) as caught:
                    list(send(channel, data))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not ended(), "the stream was to run beside all of them"
    assert stream.token_ids == list(undisturbed.token_ids)
    wait_until_idle(client)


def test_an_unknown_option(one_of_each: Fleet) -> None:
    with pytest.raises(TypeError, match="temprature"):
        one_of_each.client.complete(prompt="a", temprature=1.0)  # type: ignore[call-arg]


def test_an_unknown_field_of_a_newer_client_is_skipped(one_of_each: Fleet) -> None:
    """As everywhere with protobuf: it changes nothing."""
    data = GenerateRequest(prompt="a", max_tokens=4, ignore_eos=True).SerializeToString()
    newer = b"\xfa\x3e\x03new"  # field 1007, three bytes
    with grpc.insecure_channel(one_of_each.client.target) as channel:
        token_ids = [token for response in send(channel, data + newer) for token in response.token_ids]
    assert token_ids == list(one_of_each.client.complete(prompt="a", max_tokens=4, ignore_eos=True).token_ids)


@contextmanager
def running_beside(client: Client) -> Iterator[tuple[Streamed, Any]]:
    """A long stream in a thread, which has come to its end behind the block."""
    stream = Streamed(client, BESIDE)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream.run)
        wait_until(lambda: len(stream.token_ids) > 10, REQUEST_S, "the stream runs")
        yield stream, running.done
        running.result(REQUEST_S)


def send(channel: grpc.Channel, data: bytes) -> Iterator[gateway_pb2.GenerateResponse]:
    """Generate with these very bytes as the request."""
    call = channel.unary_stream(GENERATE, response_deserializer=gateway_pb2.GenerateResponse.FromString)
    responses: Iterator[gateway_pb2.GenerateResponse] = call(data, timeout=20)
    return responses
