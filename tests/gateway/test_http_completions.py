"""/v1/completions over real HTTP, in front of scripted workers."""

from __future__ import annotations

import pytest
from gateway_harness import PROMPT
from http_harness import MODEL, http_house
from scripted_workers import ScriptedDecode, ScriptedPrefill, expected_tokens, logprobs_at

from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

PATH = "/v1/completions"


async def test_one_answer(tokens: Tokens) -> None:
    async with http_house(tokens, [ScriptedPrefill(cached=2)]) as h:
        done = await h.openai.completions.create(model=MODEL, prompt=list(PROMPT), max_tokens=8, seed=5)
        (choice,) = done.choices
        assert choice.text == tokens.decode(expected_tokens(PROMPT, 8))
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert (done.object, done.model) == ("text_completion", MODEL)
        assert done.id == f"cmpl-{done._request_id}"
        usage = done.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 8, 11)
        assert usage.prompt_tokens_details.cached_tokens == 2
        details = usage.completion_tokens_details
        assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 14)
        assert h.house.prefills[0].requests[0].sampling.seed == 5


async def test_the_stream_adds_up_to_the_answer(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        stream = await h.openai.completions.create(
            model=MODEL, prompt=list(PROMPT), max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        *parts, last = chunks
        assert "".join(part.choices[0].text for part in parts) == tokens.decode(expected_tokens(PROMPT, 8))
        assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert len({chunk.id for chunk in chunks}) == 1
        assert [part.usage for part in parts] == [None] * len(parts)
        assert last.choices == []
        assert last.usage.completion_tokens == 8
        events = await h.events(PATH, prompt=list(PROMPT), max_tokens=2)
        assert all("usage" not in event for event in events)
        events = await h.events(
            PATH, prompt=list(PROMPT), max_tokens=3, stream_options={"continuous_usage_stats": True}
        )
        assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


async def test_every_option_reaches_the_workers(tokens: Tokens) -> None:
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
    }
    async with http_house(tokens) as h:
        response = await h.post(
            PATH,
            prompt=list(PROMPT),
            max_tokens=8,
            **options,
            logit_bias={"3": -1.5},
            bad_words=["fox"],
            min_tokens=3,
            logprobs=4,
            draft_nodes=2,
            priority=-7,
            stop_token_ids=[7],
            ignore_eos=True,
            user="somebody",
            metadata={"a": "b"},
            store=False,
        )
        assert response.status_code == 200, response.text
        request = h.house.prefills[0].requests[0]
        assert {name: getattr(request.sampling, name) for name in options} == options
        assert [(entry.token_id, entry.bias) for entry in request.sampling.logit_bias] == [(3, -1.5)]
        assert request.sampling.bad_words
        assert (request.min_tokens, request.logprobs, request.draft_nodes) == (3, 4, 2)
        assert list(request.stop_token_ids) == [7]
        assert h.house.decodes[0].reservations[0].priority == -7


async def test_openai_s_defaults(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        done = await h.openai.completions.create(model=MODEL, prompt="the fox", extra_body={"top_k": -1, "seed": -1})
        request = h.house.prefills[0].requests[0]
        assert request.sampling.temperature == 1.0
        assert (request.sampling.top_p, request.sampling.top_k, request.sampling.seed) == (1.0, 0, 2**63 - 1)
        assert done.usage.completion_tokens == 16


async def test_logprobs_and_offsets(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        done = await h.openai.completions.create(model=MODEL, prompt=list(PROMPT), max_tokens=6, logprobs=2)
        ids = expected_tokens(PROMPT, 6)
        (choice,) = done.choices
        got = choice.logprobs
        assert got.tokens == [tokens.piece(token_id) for token_id in ids]
        assert got.token_logprobs == [logprobs_at(PROMPT, index, 0, 2).logprob for index in range(6)]
        for index, token_id in enumerate(ids):
            top = logprobs_at(PROMPT, index, 0, 2)
            assert got.top_logprobs[index] == {
                tokens.piece(one): value for one, value in zip(top.top_token_ids, top.top_logprobs, strict=True)
            }
            assert got.text_offset[index] == len(tokens.decode(ids[:index]).rstrip("\ufffd"))
            assert choice.text[got.text_offset[index] :].startswith(tokens.piece(token_id).rstrip("\ufffd"))
        events = await h.events(PATH, prompt=list(PROMPT), max_tokens=6, logprobs=2)
        pieces = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
        assert [text for piece in pieces for text in piece["tokens"]] == got.tokens
        assert [offset for piece in pieces for offset in piece["text_offset"]] == got.text_offset


async def test_several_prompts_and_samples(tokens: Tokens) -> None:
    prompts = [[41, 42, 43], [50, 51], [60]]
    async with http_house(tokens) as h:
        done = await h.openai.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=4)
        assert [choice.index for choice in done.choices] == list(range(6))
        for choice in done.choices:
            prompt, sample = tuple(prompts[choice.index // 2]), choice.index % 2
            assert choice.text == tokens.decode(expected_tokens(prompt, 4, sample))
        assert done.usage.prompt_tokens == 6
        assert done.usage.completion_tokens == 24
        events = await h.events(PATH, prompt=prompts, n=2, max_tokens=4)
        texts = [""] * 6
        for event in events:
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert texts == [choice.text for choice in done.choices]
        texts = await h.openai.completions.create(model=MODEL, prompt=["the fox", "köln"], max_tokens=4)
        assert [len(choice.text) > 0 for choice in texts.choices] == [True, True]


async def test_echo(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        plain = await h.openai.completions.create(model=MODEL, prompt="the fox", max_tokens=4)
        echo = await h.openai.completions.create(model=MODEL, prompt="the fox", max_tokens=4, echo=True)
        assert echo.choices[0].text == "the fox" + plain.choices[0].text
        echo = await h.openai.completions.create(model=MODEL, prompt=list(PROMPT), max_tokens=4, echo=True, n=2)
        for sample, choice in enumerate(echo.choices):
            expected = tokens.decode(list(PROMPT)) + tokens.decode(expected_tokens(PROMPT, 4, sample))
            assert choice.text == expected
        events = await h.events(PATH, prompt="the fox", max_tokens=4, echo=True)
        assert "".join(event["choices"][0]["text"] for event in events) == "the fox" + plain.choices[0].text


async def test_stop_strings(tokens: Tokens) -> None:
    text = tokens.decode(expected_tokens(PROMPT, 20))
    async with http_house(tokens) as h:
        for stop in (text[4:7], [text[4:7], "never"]):
            done = await h.openai.completions.create(model=MODEL, prompt=list(PROMPT), max_tokens=20, stop=stop)
            assert done.choices[0].text == text[: text.index(text[4:7])]
            assert done.choices[0].finish_reason == "stop"
        events = await h.events(PATH, prompt=list(PROMPT), max_tokens=20, stop=text[4:7])
        assert "".join(event["choices"][0]["text"] for event in events) == text[: text.index(text[4:7])]


async def test_token_ids_come_back(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        response = (await h.post(PATH, prompt=list(PROMPT), max_tokens=4, return_token_ids=True)).json()
        assert response["choices"][0]["token_ids"] == expected_tokens(PROMPT, 4)
        assert response["choices"][0]["prompt_token_ids"] == list(PROMPT)
        events = await h.events(PATH, prompt=list(PROMPT), max_tokens=4, return_token_ids=True)
        ids = [token_id for event in events for token_id in event["choices"][0]["token_ids"]]
        assert ids == expected_tokens(PROMPT, 4)


async def test_a_failover_is_not_seen(tokens: Tokens) -> None:
    decode = ScriptedDecode(preempting=1)
    async with http_house(tokens, decodes=[decode]) as h:
        events = await h.events(PATH, prompt=list(PROMPT), max_tokens=12)
        assert "".join(event["choices"][0]["text"] for event in events) == tokens.decode(expected_tokens(PROMPT, 12))
        assert len(decode.reservations) == 2
