"""Every RPC of the gateway has a method of both clients, and what these make of the answers."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from branchline import client as sdk
from branchline.client import AsyncClient, ChatOptions, Client, ToolCall
from branchline.client.chat import chat_request
from branchline.client.options import sampling_request
from branchline.client.testing import FakeServer, Pause, Reply
from branchline.v1 import gateway_pb2

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"]
USER = {"role": "user", "content": "hi"}
TOOLS = [
    {"name": "f", "description": "does f", "parameters": {"type": "object"}},
    {"type": "function", "function": {"name": "g"}},
]

#: One call of each RPC's method that ends at once.
CALLS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda client: client.generate(prompt="x"),
    "chat": lambda client: client.chat(messages=[USER]),
    "tokenize": lambda client: client.tokenize(prompt="ab"),
    "detokenize": lambda client: client.detokenize([97, 98]),
    "info": lambda client: client.info(),
    "models": lambda client: client.models(),
    "status": lambda client: client.status(),
    "abort": lambda client: client.abort("r"),
}


def method_name(rpc: str) -> str:
    """`ListModels` is `models`, `GetInfo` is `info`."""
    return re.sub("(?<!^)(?=[A-Z])", "_", re.sub("^(Get|List)", "", rpc)).lower()


def test_every_rpc_has_a_method_that_calls_it(server: FakeServer) -> None:
    with Client(server.target) as client:
        for name in map(method_name, (rpc.name for rpc in SERVICE.methods)):
            with contextlib.suppress(sdk.InvalidRequestError):  # there is no request to abort
                result = CALLS[name](client)
                if isinstance(result, sdk.Stream):
                    list(result)
    assert {request.rpc for request in server.requests} == {rpc.name for rpc in SERVICE.methods}


async def test_and_so_has_the_other_client(server: FakeServer) -> None:
    async with AsyncClient(server.target) as client:
        for name in map(method_name, (rpc.name for rpc in SERVICE.methods)):
            result = CALLS[name](client)
            with contextlib.suppress(sdk.InvalidRequestError):
                if isinstance(result, sdk.AsyncStream):
                    async for _ in result:
                        pass
                else:
                    await result
    assert {request.rpc for request in server.requests} == {rpc.name for rpc in SERVICE.methods}


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert public(Client) == public(AsyncClient)
    assert public(sdk.Stream) == public(sdk.AsyncStream)


CHAT = Reply("hi", reasoning="hmm", tool_calls=[ToolCall("c0", "f", '{"x": 1}'), ToolCall("c1", "g", '{"x": 1}')])


def test_a_chat(server: FakeServer) -> None:
    server.script = CHAT
    with Client(server.target) as client:
        with client.chat(messages=[USER], tools=TOOLS, n=2, temperature=0.5) as stream:
            assert stream.request_id() == "fake-1"
            chunks = list(stream)
        done = stream.result
        client.complete_chat(
            messages=[USER, done.answers[0].message, {"role": "tool", "content": "1", "tool_call_id": "c0"}],
            tool_choice="none",
            template_arguments={"enable_thinking": False},
        )
    assert "".join(chunk.text for chunk in chunks if chunk.part.sample == 1) == "hi"
    assert [chunk.part.finish_reason for chunk in chunks if chunk.part.finish_reason] == ["stop"] * 2
    assert done.text == "hi"
    assert done.reasoning == "hmm"
    assert list(done.tool_calls) == CHAT.tool_calls
    assert done.answers[1] == done.answers[0]
    assert done.completion.usage.prompt_tokens == 2
    assert [sample.text for sample in done.completion.samples] == ["hi", "hi"]
    first, second = (request.message for request in server.requests)
    assert [(tool.name, tool.description, tool.parameters) for tool in first.tools] == [
        ("f", "does f", '{"type": "object"}'),
        ("g", "", ""),
    ]
    assert (first.tool_choice, first.options.n) == (gateway_pb2.TOOL_CHOICE_AUTO, 2)
    assert second.messages[1].reasoning == "hmm"
    assert [call.name for call in second.messages[1].tool_calls] == ["f", "g"]
    assert second.messages[2].tool_call_id == "c0"
    assert second.tool_choice == gateway_pb2.TOOL_CHOICE_NONE
    assert second.template_arguments == '{"enable_thinking": false}'


async def test_a_chat_of_the_other_client(server: FakeServer) -> None:
    server.script = CHAT
    async with AsyncClient(server.target) as client:
        async with client.chat(messages=[USER], tools=TOOLS) as stream:
            assert await stream.request_id() == "fake-1"
            text = "".join([chunk.text async for chunk in stream])
        assert (text, stream.result.text) == ("hi", "hi")
        assert (await client.complete_chat(messages=[USER])).reasoning == "hmm"


def test_the_other_answers(server: FakeServer) -> None:
    with Client(server.target) as client:
        assert client.tokenize(prompt="ab") == (97, 98)
        assert client.tokenize(messages=[USER]) == (104, 105)
        assert client.detokenize([97, 98]) == "ab"
        client.detokenize([97], special_tokens=True)
        assert server.requests[-1].message.special_tokens
        assert client.models() == (sdk.Model("fake", 4096, ("default",)),)
        assert client.status() == sdk.GatewayStatus((), 64)
        with pytest.raises(sdk.InvalidRequestError, match="exactly one of prompt and messages"):
            client.tokenize()


def test_a_request_can_be_watched_and_aborted(server: FakeServer) -> None:
    server.script = Reply(["ab", Pause(60)])
    with Client(server.target) as client, client.generate(prompt="xyz", n=2, priority=-7) as stream:
        assert [next(stream).text, next(stream).text] == ["ab", "ab"]
        (running,) = client.status().requests
        assert (running.request_id, running.interface, running.samples) == (stream.request_id(), "grpc", 2)
        assert (running.prompt_tokens, running.completion_tokens, running.priority) == (3, 4, -7)
        with pytest.raises(sdk.InvalidRequestError, match="no request 'x'"):
            client.abort("x")
        client.abort(running.request_id, reason="enough")
        with pytest.raises(sdk.CancelledError, match="enough"):
            next(stream)


def test_every_option_is_documented() -> None:
    own = {"messages", "tools", "tool_choice", "template_arguments"}
    assert own | set(inspect.signature(sampling_request).parameters) == set(ChatOptions.__annotations__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": "hi"}, "messages: must be a list"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: must have the keys"),
        ({"messages": [{**USER, "typo": "x"}]}, r"messages\[0\]: must have the keys .* got"),
        ({"messages": [{**USER, "tool_calls": ["f"]}]}, r"messages\[0\].tool_calls: must be a list of ToolCall"),
        ({"messages": [{**USER, "name": 5}]}, r"messages\[0\].name: must be a string"),
        ({"messages": [USER], "tools": {"name": "f"}}, "tools: must be a list"),
        ({"messages": [USER], "tools": [{"description": "x"}]}, r"tools\[0\]: must have a name"),
        (
            {"messages": [USER], "tools": [{"name": "f", "parameters": "x"}]},
            r"tools\[0\].parameters: must be a mapping",
        ),
        ({"messages": [USER], "tools": [{"name": "f", "parameters": {"x": {1}}}]}, "has no JSON form"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice: must be 'auto' or 'none', got 'required'"),
        ({"messages": [USER], "template_arguments": [1]}, "template_arguments: must be a mapping"),
        ({"messages": [USER], "temperature": "hot"}, "temperature: must be a number"),
    ],
)
def test_a_wrong_type_or_shape_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sdk.InvalidRequestError, match=message):
        chat_request(**options)
