"""OpenAI's own client, synchronous and asynchronous, against real processes; its answers beside the SDK's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from e2e_helpers import REQUEST_S, Fleet, wait_until, wait_until_idle

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

PROMPT = "a bad cab "
CHAT = [{"role": "user", "content": "fade a lamb"}]
GREEDY = {"temperature": 0.0, "max_tokens": 40, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def model(one_of_each: Fleet) -> str:
    return one_of_each.client.models()[0].id


@pytest.fixture
def client(one_of_each: Fleet) -> Iterator[openai.OpenAI]:
    url = f"http://{one_of_each.http}/v1"
    transport = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=REQUEST_S, http_client=transport) as client:
        yield client
    wait_until_idle(one_of_each.client)


@pytest.fixture
async def aio(one_of_each: Fleet) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{one_of_each.http}/v1"
    transport = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=REQUEST_S, http_client=transport
    ) as client:
        yield client
    wait_until_idle(one_of_each.client)


def test_completions_are_the_sdk_s(one_of_each: Fleet, client: openai.OpenAI, model: str) -> None:
    expected = one_of_each.client.complete(prompt=PROMPT, max_tokens=40, ignore_eos=True, logprobs=2)
    done = client.completions.create(model=model, prompt=PROMPT, logprobs=2, **GREEDY)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == (expected.text, "length")
    assert choice.logprobs.token_logprobs == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-4)
    assert done.usage.prompt_tokens == expected.usage.prompt_tokens
    assert done.usage.completion_tokens_details.accepted_prediction_tokens > 0
    assert done.usage.completion_tokens_details.rejected_prediction_tokens > 0
    stream = client.completions.create(
        model=model, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert last.usage.completion_tokens == 40


def test_chats_are_the_sdk_s(one_of_each: Fleet, client: openai.OpenAI, model: str) -> None:
    options = {"temperature": 0.8, "seed": 5, "n": 3, "max_tokens": 30}
    expected = one_of_each.client.complete_chat(messages=CHAT, **options)
    done = client.chat.completions.create(model=model, messages=CHAT, **options)
    assert [choice.message.content for choice in done.choices] == [answer.text for answer in expected.answers]
    texts = [""] * 3
    for chunk in client.chat.completions.create(model=model, messages=CHAT, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [answer.text for answer in expected.answers]


def test_prompts_that_begin_alike_are_cached(one_of_each: Fleet, client: openai.OpenAI, model: str) -> None:
    prompt = "a long enough flag " * 8
    for _ in range(2):
        done = client.completions.create(model=model, prompt=prompt, max_tokens=2)
    assert done.usage.prompt_tokens_details.cached_tokens >= 64
    assert one_of_each.client.tokenize(prompt=prompt) != ()


def test_errors(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="context limit") as caught:
        client.completions.create(model=model, prompt="a" * 3000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="chat template refuses"):
        client.chat.completions.create(model=model, messages=[{"role": "tool", "content": "x", "tool_call_id": "c"}])


def test_a_reader_that_leaves_frees_everything(one_of_each: Fleet, client: openai.OpenAI, model: str) -> None:
    for _ in range(3):
        stream = client.completions.create(
            model=model, prompt=PROMPT, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}
        )
        next(stream)
        stream.close()
    wait_until_idle(one_of_each.client)


def test_a_client_that_hangs_up_before_its_answer(one_of_each: Fleet, client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model=model, prompt=PROMPT, max_tokens=1500, timeout=0.5, extra_body={"ignore_eos": True}
        )
    wait_until_idle(one_of_each.client)


def test_an_abort_by_the_sdk(one_of_each: Fleet, client: openai.OpenAI, model: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            client.completions.create, model=model, prompt=PROMPT, max_tokens=1500, extra_body={"ignore_eos": True}
        )
        wait_until(lambda: bool(one_of_each.client.status().requests), 10, "it runs")
        (request,) = one_of_each.client.status().requests
        assert request.interface == "http"
        one_of_each.client.abort(request.request_id, reason="enough")
        with pytest.raises(openai.APIStatusError, match="aborted: enough"):
            running.result(10)


async def test_many_at_once(aio: openai.AsyncOpenAI, model: str) -> None:
    async def one(number: int) -> str:
        stream = await aio.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "a" * (1 + number % 4)}], stream=True, **GREEDY
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    texts = await asyncio.gather(*(one(number) for number in range(24)))
    assert len(set(texts)) <= 4
    assert [texts[number] for number in range(4)] * 6 == texts
