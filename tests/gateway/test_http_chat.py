"""/v1/chat/completions over real HTTP, in front of scripted workers; without parsers."""

from __future__ import annotations

import pytest
from http_harness import MODEL, http_house
from scripted_workers import ScriptedPrefill, expected_tokens, logprobs_at
from tiny_tokenizer import tiny_tokens

from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.id }}:{{ c.function.name }}({{ c.function.arguments.x }})]{% endfor %}"
    "{{ m.tool_call_id or '' }}{{ m.reasoning_content or '' }}\n{% endfor %}"
    "{% if shout %}!{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prompt_of(tokens: Tokens, text: str) -> tuple[int, ...]:
    return tuple(tokens.tokenizer.encode(text, add_special_tokens=False))


HELLO = "<user>hello\n<assistant>"


async def test_one_answer(tokens: Tokens) -> None:
    prompt = prompt_of(tokens, HELLO)
    async with http_house(tokens, [ScriptedPrefill(cached=2)]) as h:
        done = await h.openai.chat.completions.create(model=MODEL, messages=USER, max_completion_tokens=8)
        (choice,) = done.choices
        assert (choice.message.role, choice.message.tool_calls) == ("assistant", None)
        assert choice.message.content == tokens.decode(expected_tokens(prompt, 8))
        assert (choice.finish_reason, choice.logprobs, done.object) == ("length", None, "chat.completion")
        assert done.id == f"chatcmpl-{done._request_id}"
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), 8)
        assert done.usage.prompt_tokens_details.cached_tokens == 2
        assert done.usage.completion_tokens_details.rejected_prediction_tokens == 14


async def test_the_stream_adds_up_to_the_answer(tokens: Tokens) -> None:
    prompt = prompt_of(tokens, HELLO)
    async with http_house(tokens) as h:
        stream = await h.openai.chat.completions.create(
            model=MODEL, messages=USER, max_tokens=8, n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        for sample in range(2):
            parts = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == sample]
            assert parts[0].delta.role == "assistant"
            assert all(part.delta.role is None for part in parts[1:])
            text = "".join(part.delta.content or "" for part in parts)
            assert text == tokens.decode(expected_tokens(prompt, 8, sample))
            assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 16
        async with h.openai.chat.completions.stream(model=MODEL, messages=USER, max_tokens=8) as helper:
            async for _ in helper:
                pass
            final = helper.current_completion_snapshot
        assert final.choices[0].message.content == tokens.decode(expected_tokens(prompt, 8))


async def test_messages_of_all_kinds(tokens: Tokens) -> None:
    tokens = tiny_tokens(TOOLS_TEMPLATE)
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "reasoning_content": "(hm)",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}],
        },
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        *USER,
    ]
    async with http_house(tokens) as h:
        done = await h.openai.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=1, extra_body={"chat_template_kwargs": {"shout": True}}
        )
        text = "<system>be brief\n<assistant>[c1:f(5)](hm)\n<tool>7c1\n<user>hello\n!<assistant>"
        assert tuple(h.house.prefills[0].requests[0].prompt) == prompt_of(tokens, text)
        # An answer's message can be sent back as it is.
        again = [*USER, done.choices[0].message.model_dump(), *USER]
        await h.openai.chat.completions.create(model=MODEL, messages=again, max_tokens=1)
    tokens.close()


async def test_tools_need_a_parser_or_are_not_shown() -> None:
    tokens = tiny_tokens(TOOLS_TEMPLATE)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    async with http_house(tokens) as h:
        status, error = await h.refused(PATH, messages=USER, tools=tools)
        assert status == 400
        assert "tool_parser names a parser" in error["message"]
        await h.openai.chat.completions.create(
            model=MODEL, messages=USER, tools=tools, tool_choice="none", max_tokens=1
        )
        assert tuple(h.house.prefills[0].requests[0].prompt) == prompt_of(tokens, HELLO)
    tokens.close()


async def test_logprobs(tokens: Tokens) -> None:
    prompt = prompt_of(tokens, HELLO)
    async with http_house(tokens) as h:
        done = await h.openai.chat.completions.create(
            model=MODEL, messages=USER, max_tokens=6, logprobs=True, top_logprobs=2
        )
        content = done.choices[0].logprobs.content
        ids = expected_tokens(prompt, 6)
        assert [entry.token for entry in content] == [tokens.piece(token_id) for token_id in ids]
        assert [entry.logprob for entry in content] == [logprobs_at(prompt, i, 0, 2).logprob for i in range(6)]
        assert [len(entry.top_logprobs) for entry in content] == [2] * 6
        stream = await h.openai.chat.completions.create(
            model=MODEL, messages=USER, max_tokens=6, logprobs=True, top_logprobs=2, stream=True
        )
        pieces = [chunk.choices[0].logprobs async for chunk in stream if chunk.choices[0].logprobs]
        assert [entry for piece in pieces for entry in piece.content] == content


async def test_the_bytes_of_a_split_character(tokens: Tokens) -> None:
    """Two tokens that are half a character each: no text alone, but their bytes add up to it."""
    ids = next(
        ids
        for character in map(chr, range(0x1F300, 0x1F700))
        if len(ids := prompt_of(tokens, character)) > 1 and all("\ufffd" in tokens.piece(one) for one in ids)
    )
    assert b"".join(tokens.piece_bytes(one) for one in ids).decode() == tokens.decode(list(ids))
    assert tokens.piece_bytes(prompt_of(tokens, "a")[0]) == b"a"


async def test_every_option_reaches_the_workers(tokens: Tokens) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.5}
    options |= {"presence_penalty": 0.25, "frequency_penalty": -0.25, "seed": 11}
    async with http_house(tokens) as h:
        response = await h.post(
            PATH, messages=USER, max_tokens=4, **options, stop=["x"], logit_bias={"3": -1.5}, draft_nodes=0
        )
        assert response.status_code == 200, response.text
        request = h.house.prefills[0].requests[0]
        assert {name: getattr(request.sampling, name) for name in options} == options
        assert request.draft_nodes == 0
        await h.post(PATH, messages=USER)
        assert h.house.prefills[0].requests[1].max_tokens == 256 - len(request.prompt)
        assert h.house.prefills[0].requests[1].sampling.temperature == 1.0


async def test_token_ids_come_back(tokens: Tokens) -> None:
    ids = expected_tokens(prompt_of(tokens, HELLO), 4)
    async with http_house(tokens) as h:
        answer = (await h.post(PATH, messages=USER, max_tokens=4, return_token_ids=True)).json()
        assert answer["choices"][0]["token_ids"] == ids
        events = await h.events(PATH, messages=USER, max_tokens=4, return_token_ids=True)
        assert [one for event in events for one in event["choices"][0].get("token_ids", [])] == ids
