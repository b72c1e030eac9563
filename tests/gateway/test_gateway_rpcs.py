"""The gateway's RPCs beside Generate, against a whole gateway and through the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from gateway_harness import PROMPT, House, house
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually, expected_tokens
from test_http_chat import HELLO, prompt_of
from tiny_tokenizer import EOS, tiny_tokens

from branchline import client as sdk
from branchline.client import AsyncClient
from branchline.v1 import gateway_pb2
from branchline.wire.status import RETRY_METADATA
from gateway.conversation import RESERVED
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

USER = {"role": "user", "content": "hello"}


@contextlib.asynccontextmanager
async def served(tokens: Tokens, **settings: Any) -> AsyncIterator[tuple[House, AsyncClient]]:
    decode = settings.pop("decode", ScriptedDecode())
    async with house(tokens, [ScriptedPrefill()], [decode], **settings) as h:
        async with AsyncClient(h.target) as client:
            yield h, client
        await h.idle(3.0)  # a worker that lets a request wait for room notices its end within a second


async def test_chat_is_generate_without_a_parser(tokens: Tokens) -> None:
    async with served(tokens) as (h, client):
        done = await client.complete_chat(messages=[USER], max_tokens=8, n=2, logprobs=1, seed=3)
        prompt = prompt_of(tokens, HELLO)
        for sample, answer in enumerate(done.answers):
            assert answer.text == tokens.decode(expected_tokens(prompt, 8, sample))
            assert (answer.reasoning, answer.tool_calls) == ("", ())
        assert [len(sample.logprobs) for sample in done.completion.samples] == [8, 8]
        assert done.completion.seed == 3
        same = await client.complete(messages=[USER], max_tokens=8)
        assert same.text == done.text
        assert h.prefills[0].requests[0].prompt == h.prefills[0].requests[1].prompt


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (gateway_pb2.ChatRequest(), "chat.messages: at least one"),
        (
            gateway_pb2.ChatRequest(
                messages=[gateway_pb2.ChatMessage(role="user", content="a")],
                options=gateway_pb2.GenerateRequest(prompt="b"),
            ),
            "options.prompt: the messages are the input",
        ),
        (
            gateway_pb2.ChatRequest(
                messages=[gateway_pb2.ChatMessage(role="user")], tools=[gateway_pb2.Tool(name="f", parameters="[")]
            ),
            r"chat.tools\[0\].parameters: must be a JSON object",
        ),
        (
            gateway_pb2.ChatRequest(
                messages=[gateway_pb2.ChatMessage(role="user")], tools=[gateway_pb2.Tool(name="f")] * 2
            ),
            "there is another tool named 'f'",
        ),
        (
            gateway_pb2.ChatRequest(
                messages=[gateway_pb2.ChatMessage(role="user")], tools=[gateway_pb2.Tool(name="f")] * 129
            ),
            "chat.tools: at most 128, got 129",
        ),
        (
            gateway_pb2.ChatRequest(
                messages=[gateway_pb2.ChatMessage(role="user")], tools=[gateway_pb2.Tool(name="f")]
            ),
            "the model's chat template knows no tools",
        ),
        (
            gateway_pb2.ChatRequest(
                messages=[gateway_pb2.ChatMessage(role="user")], template_arguments='{"messages": 1}'
            ),
            "template_arguments: messages can't be set",
        ),
        (
            gateway_pb2.ChatRequest(messages=[gateway_pb2.ChatMessage(role="user", content="x" * 100_000)]),
            "chat: too long",
        ),
    ],
)
async def test_a_chat_that_is_refused(tokens: Tokens, request_: gateway_pb2.ChatRequest, message: str) -> None:
    async with served(tokens) as (h, _):
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            async for _response in h.stub.Chat(request_, timeout=10):
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError):
            await h.stub.Tokenize(gateway_pb2.TokenizeRequest(chat=request_), timeout=10)


async def test_a_template_that_breaks_out_is_stopped() -> None:
    """jinja2's sandbox: what is behind Python's underscores stays there."""
    tokens = tiny_tokens("{{ messages.__class__.__mro__ }}{{ messages[0].__init__.__globals__ }}")
    async with served(tokens) as (_, client):
        with pytest.raises(sdk.InvalidRequestError, match="chat template refuses"):
            await client.complete_chat(messages=[USER])
    tokens.close()


async def test_tokenize_and_back(tokens: Tokens) -> None:
    async with served(tokens) as (_, client):
        ids = await client.tokenize(prompt="the fox, köln")
        assert ids == prompt_of(tokens, "the fox, köln")
        assert await client.detokenize(ids) == "the fox, köln"
        assert await client.tokenize(prompt="") == ()
        assert await client.detokenize([]) == ""
        assert await client.tokenize(messages=[USER]) == prompt_of(tokens, HELLO)
        ended = [*prompt_of(tokens, "fox"), tokens.eos_ids[0]]
        assert await client.detokenize(ended) == "fox"
        assert await client.detokenize(ended, special_tokens=True) == f"fox{EOS}"
        with pytest.raises(sdk.InvalidRequestError, match=r"token_ids\[1\]: 480 is not below"):
            await client.detokenize([1, 480])
        with pytest.raises(sdk.InvalidRequestError, match="more than the context limit"):
            await client.detokenize([1] * 257)
        with pytest.raises(sdk.InvalidRequestError, match="prompt: too long"):
            await client.tokenize(prompt="x" * 100_000)


async def test_models(tokens: Tokens) -> None:
    async with served(tokens, served_model_name="mine") as (_, client):
        assert await client.models() == (sdk.Model("mine", 256, ("scripted", "tiny")),)
        assert (await client.info()).model == "mine"


async def test_status_and_abort(tokens: Tokens) -> None:
    async with served(tokens, decode=ScriptedDecode(pace_s=0.05)) as (h, client):
        assert await client.status() == sdk.GatewayStatus((), 256)
        stream = client.generate(token_ids=PROMPT, max_tokens=200, n=2, priority=-3)
        request_id = await stream.request_id()
        await anext(stream)
        (running,) = (await client.status()).requests
        assert (running.request_id, running.interface, running.prompt_tokens) == (request_id, "grpc", 3)
        assert (running.samples, running.priority) == (2, -3)
        assert 0 < running.completion_tokens < 400
        assert 0 < running.age_s < 10
        await client.abort(request_id, reason="enough")
        with pytest.raises(sdk.CancelledError, match="the request was aborted: enough"):
            async for _ in stream:
                pass
        await h.idle()
        assert (await client.status()).requests == ()
        with pytest.raises(sdk.InvalidRequestError, match="no request"):
            await client.abort(request_id)


async def test_a_request_that_waits_for_room_can_be_aborted(tokens: Tokens) -> None:
    async with served(tokens, decode=ScriptedDecode(capacity=0)) as (_, client):
        task = asyncio.create_task(client.complete(token_ids=PROMPT))
        await eventually_async(client)
        (running,) = (await client.status()).requests
        await client.abort(running.request_id)
        with pytest.raises(sdk.CancelledError, match="no reason was given"):
            await task


async def eventually_async(client: AsyncClient) -> None:
    async with asyncio.timeout(5):
        while not (await client.status()).requests:
            await asyncio.sleep(0.01)


async def test_a_full_gateway_says_when_to_try_again(tokens: Tokens) -> None:
    async with served(tokens, decode=ScriptedDecode(pace_s=0.05), max_requests=1) as (h, client):
        holder = client.generate(token_ids=PROMPT, max_tokens=200)
        await anext(holder)
        call = h.call(4)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())[RETRY_METADATA] == "1000"
        await holder.close()


async def test_a_gateway_that_stops_sends_everybody_away(tokens: Tokens) -> None:
    async with served(tokens, decode=ScriptedDecode(pace_s=0.05)) as (h, client):
        stream = client.generate(token_ids=PROMPT, max_tokens=200)
        await anext(stream)
        h.desk.door.close()
        with pytest.raises(sdk.UnavailableError, match="the gateway is stopping"):
            async for _ in stream:
                pass
        for call in (client.complete(token_ids=PROMPT), client.models(), client.tokenize(prompt="a")):
            with pytest.raises(sdk.UnavailableError, match="the gateway is stopping"):
                await call
        await eventually(lambda: not h.desk.door.visits)


def test_what_templates_are_called_with_can_t_be_set_by_requests(tokens: Tokens) -> None:
    parameters = inspect.signature(type(tokens.tokenizer).apply_chat_template).parameters
    assert set(parameters) - {"self", "kwargs"} <= RESERVED
