"""vLLM's own parsers in the gateway: reasoning and tool calls out of what scripted workers write."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from gateway_harness import house
from http_harness import MODEL, http_house
from scripted_workers import ScriptedDecode, ScriptedPrefill
from test_http_chat import PATH, TOOLS_TEMPLATE, USER
from tiny_tokenizer import train

from branchline.config import ConfigError
from branchline.v1 import gateway_pb2, types_pb2
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(180)]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLS = [("weather", {"city": "köln"}), ("weather", {"city": "日本"})]
TEXT = "<think>so, so</think>Let me see. " + "\n".join(
    "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"
    for name, arguments in CALLS
)


@pytest.fixture(scope="module")
def tokens() -> Iterator[Tokens]:
    tokenizer = train(TOOLS_TEMPLATE)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokens = Tokens(tokenizer, vocab_size=len(tokenizer), eos_ids=(tokenizer.eos_token_id,))
    yield tokens
    tokens.close()


def scripted(tokens: Tokens, text: str = TEXT) -> dict[str, list]:
    script = (*tokens.tokenizer.encode(text, add_special_tokens=False), tokens.eos_ids[0])
    return {
        "prefills": [ScriptedPrefill(script=script, max_model_len=1024)],
        "decodes": [ScriptedDecode(script=script, max_model_len=1024)],
    }


def parsers(tokens: Tokens, tools: str = "hermes", reasoning: str = "deepseek_r1"):
    from gateway.vllm_parsers import VllmParsers

    return VllmParsers(tokens.tokenizer, tools, reasoning)


async def test_reasoning_content_and_calls(tokens: Tokens) -> None:
    async with http_house(tokens, **scripted(tokens), parsers=parsers(tokens)) as h:
        done = await h.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, n=2)
        for choice in done.choices:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content.strip() == "Let me see."
            assert choice.message.reasoning == choice.message.reasoning_content == "so, so"
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
            assert calls == CALLS
            assert len({call.id for call in choice.message.tool_calls}) == 2
        # The answer goes back, with the tool's.
        message = done.choices[0].message
        answers = [{"role": "tool", "content": "rain", "tool_call_id": call.id} for call in message.tool_calls]
        await h.openai.chat.completions.create(
            model=MODEL, messages=[*USER, message.model_dump(), *answers], tools=TOOLS
        )


async def test_the_same_in_a_stream(tokens: Tokens) -> None:
    async with http_house(tokens, **scripted(tokens), parsers=parsers(tokens)) as h:
        stream = await h.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, stream=True)
        content, reasoning, calls, reasons = "", "", {}, []
        async for chunk in stream:
            (choice,) = chunk.choices
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert call.type == "function"
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""
        assert (content.strip(), reasoning, reasons) == ("Let me see.", "so, so", ["tool_calls"])
        assert [(name, json.loads(text)) for name, text in calls.values()] == CALLS


async def test_one_call_and_no_reasoning(tokens: Tokens) -> None:
    async with http_house(tokens, **scripted(tokens), parsers=parsers(tokens)) as h:
        for stream in (False, True):
            body = {"messages": USER, "tools": TOOLS, "parallel_tool_calls": False, "include_reasoning": False}
            if stream:
                choices = [event["choices"][0]["delta"] for event in await h.events(PATH, **body)]
            else:
                choices = [(await h.post(PATH, **body)).json()["choices"][0]["message"]]
            names = [
                call["function"]["name"]
                for choice in choices
                for call in choice.get("tool_calls", [])
                if "name" in call["function"]
            ]
            assert names == ["weather"]
            assert not any("reasoning" in choice for choice in choices)


async def test_text_without_any(tokens: Tokens) -> None:
    async with http_house(tokens, **scripted(tokens, "just text"), parsers=parsers(tokens, reasoning="")) as h:
        done = await h.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
        assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("just text", "stop")
        assert done.choices[0].message.tool_calls is None
        done = await h.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, tool_choice="none")
        assert done.choices[0].message.content == "just text"


async def test_a_parser_that_fails_costs_the_parsing_only(tokens: Tokens) -> None:
    broken = parsers(tokens)

    class Torn(broken._kind):
        def parse(self, *_: object, **__: object) -> None:
            raise RuntimeError("scripted")

        parse_delta = parse

    broken._kind = Torn
    async with http_house(tokens, **scripted(tokens), parsers=broken) as h:
        done = await h.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS)
        assert done.choices[0].message.content == TEXT
        events = await h.events(PATH, messages=USER, tools=TOOLS)
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == TEXT


async def test_over_grpc(tokens: Tokens) -> None:
    async with house(tokens, **scripted(tokens), parsers=parsers(tokens)) as h:
        request = gateway_pb2.ChatRequest(
            messages=[gateway_pb2.ChatMessage(role="user", content="hello")],
            tools=[gateway_pb2.Tool(name="weather", parameters='{"type": "object"}')],
        )
        text, reasoning, calls, last = "", "", {}, None
        async for response in h.stub.Chat(request, timeout=20):
            text += response.part.text
            reasoning += response.reasoning
            last = response
            for call in response.tool_calls:
                name, arguments = calls.get(call.index, ("", ""))
                calls[call.index] = (name + call.name, arguments + call.arguments)
        assert (text.strip(), reasoning) == ("Let me see.", "so, so")
        assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == CALLS
        assert last.part.finished.finish_reason == types_pb2.FINISH_REASON_STOP


def test_names_that_vllm_does_not_know(tokens: Tokens) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.tool_parser"):
        parsers(tokens, "nobody", "")
    with pytest.raises(ConfigError, match="bot token"):
        parsers(tokens, "llama3_json", "")
