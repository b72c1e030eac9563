"""The fake server that users test against, as far as the other tests here don't use it."""

from __future__ import annotations

import pytest

import branchline.client as sdk
from branchline.client import Chunk, Client
from branchline.client.testing import FakeServer, Fault, Pause, Reply
from branchline.v1 import gateway_pb2

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"]


def test_every_rpc_is_answered() -> None:
    assert {rpc.name for rpc in SERVICE.methods} <= set(vars(FakeServer))


def test_answers_by_prompt() -> None:
    script = {
        "a": "text",
        "b": Reply(["two", " words"], finish_reason=sdk.FinishReason.LENGTH),
        "c": [Reply("first"), Reply("second")],
        "d": Reply([Chunk("whole", (7, 8)), Pause(0.01)]),
        "e": Fault("RESOURCE_EXHAUSTED", "full", retry_after=60),
    }
    with FakeServer(script) as server, Client(server.target) as client:
        assert [chunk.text for chunk in client.generate(prompt="a")] == [*"text", ""]
        assert [chunk.text for chunk in client.generate(prompt="b")] == ["two", " words", ""]
        assert client.complete(messages=[{"role": "user", "content": "b"}]).finish_reason == "length"
        assert [sample.text for sample in client.complete(prompt="c", n=2).samples] == ["first", "second"]
        assert client.complete(prompt="d").token_ids == (7, 8)
        with pytest.raises(sdk.OverloadedError, match="full") as caught:
            client.complete(prompt="e")
        assert caught.value.retry_after == 60
        with pytest.raises(sdk.InvalidRequestError, match="no answer to 'z'"):
            client.complete(token_ids=[122])
        server.script = lambda request: request.prompt.upper()
        assert client.complete(prompt="z").text == "Z"
        assert [request.prompt for request in server.requests] == [*"abbcdezz"]


def test_a_key() -> None:
    with FakeServer(api_key="bl-1") as server:
        with Client(server.target, api_key="bl-1") as client:
            assert client.complete(prompt="x").text == "x"
            assert client.health()
        with Client(server.target) as client, pytest.raises(sdk.AuthenticationError):
            client.models()


def test_a_server_that_goes_and_comes_back() -> None:
    with FakeServer(Reply([*"abc", Pause(60)])) as server:
        client = Client(server.target, retries=20, timeout=20)
        stream = client.generate(prompt="x")
        assert [next(stream).text for _ in range(3)] == [*"abc"]
    with client, FakeServer("abcdef", port=int(server.target.rpartition(":")[2])) as server:
        assert "".join(chunk.text for chunk in stream) == "def"
        assert list(server.requests[0].options.received[0].token_ids) == [97, 98, 99]
