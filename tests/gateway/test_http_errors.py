"""What the HTTP API refuses, and how: OpenAI's error bodies, the right status, nothing left behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import openai
import pytest
from gateway_harness import PROMPT
from http_harness import MODEL, error_of, http_house
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually

from branchline.wire.status import RpcFailure
from gateway.http.exchange import MAX_BODY_BYTES
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

#: path, body, the field that is named, what the message says.
BAD: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "no prompt": (COMPLETIONS, {}, "prompt", "Missing required parameter: 'prompt'"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, "prompt", "prompt is empty"),
    "no prompts": (COMPLETIONS, {"prompt": []}, "prompt", "Invalid 'prompt'"),
    "mixed prompts": (COMPLETIONS, {"prompt": ["a", [1]]}, "prompt", "Invalid 'prompt"),
    "too many prompts": (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt", "Invalid 'prompt"),
    "a token that is none": (COMPLETIONS, {"prompt": [480]}, "token_ids", "not below the vocabulary size"),
    "a negative token": (COMPLETIONS, {"prompt": [-1]}, "prompt", "Invalid 'prompt"),
    "long prompt": (COMPLETIONS, {"prompt": [1] * 256}, "token_ids", "context limit of 256"),
    "max_tokens 0": (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
    "max_tokens over the context": (COMPLETIONS, {"prompt": "a", "max_tokens": 256}, "max_tokens", "context limit"),
    "max_tokens huge": (COMPLETIONS, {"prompt": "a", "max_tokens": 2**70}, "max_tokens", "Invalid 'max_tokens'"),
    "max_tokens text": (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
    "max_tokens real": (COMPLETIONS, {"prompt": "a", "max_tokens": 5.5}, "max_tokens", "valid integer"),
    "temperature": (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "between 0 and 100"),
    "top_p": (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p", "above 0"),
    "top_k": (COMPLETIONS, {"prompt": "a", "top_k": -2}, "top_k", "top_k must be positive"),
    "n 0": (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "between 1 and 16"),
    "n 17": (COMPLETIONS, {"prompt": "a", "n": 17}, "n", "between 1 and 16"),
    "best_of": (COMPLETIONS, {"prompt": "a", "best_of": 3}, None, "best_of: must be n"),
    "suffix": (COMPLETIONS, {"prompt": "a", "suffix": "b"}, None, "suffix"),
    "echo with logprobs": (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, None, "echo: not with logprobs"),
    "logprobs": (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "between 0 and 20"),
    "empty stop": (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop", "must not be empty"),
    "many stops": (COMPLETIONS, {"prompt": "a", "stop": ["b"] * 17}, "stop", "at most 16"),
    "a bias of no token": (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "'x' is no token id"),
    "a bias too large": (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "between -100 and 100"),
    "stream_options": (COMPLETIONS, {"prompt": "a", "stream_options": {}}, None, "only allowed when stream is true"),
    "unknown field": (COMPLETIONS, {"prompt": "a", "typo": 1}, "typo", "Unrecognized request argument supplied: typo"),
    "unknown option": (
        COMPLETIONS,
        {"prompt": "a", "stream": True, "stream_options": {"typo": 1}},
        "stream_options.typo",
        "Unrecognized request argument",
    ),
    "no messages": (CHAT, {}, "messages", "Missing required parameter: 'messages'"),
    "empty messages": (CHAT, {"messages": []}, "messages", "at least 1"),
    "no role": (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role", "Missing required parameter"),
    "unknown role": (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role", "'user'"),
    "an image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "Invalid 'messages[0].content",
    ),
    "the template refuses": (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "chat", "unknown role tool"),
    "torn arguments": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "chat.messages",
        "must be a JSON object",
    ),
    "tools without a template": (CHAT, {"messages": USER, "tools": [TOOL]}, "chat.tools", "knows no tools"),
    "tool_choice without tools": (CHAT, {"messages": USER, "tool_choice": "auto"}, None, "only allowed with tools"),
    "a forced tool": (CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "required"}, None, "only auto and none"),
    "JSON": (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, None, "only text is served"),
    "sound": (CHAT, {"messages": USER, "modalities": ["audio"]}, None, "only text is served"),
    "top_logprobs alone": (CHAT, {"messages": USER, "top_logprobs": 1}, None, "only allowed when logprobs is true"),
    "top_logprobs": (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "logprobs", "between 0 and 20"),
    "two limits": (CHAT, {"messages": USER, "max_tokens": 1, "max_completion_tokens": 2}, None, "something else"),
    "a reserved variable": (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"chat_template": "x"}},
        "chat.template_arguments",
        "chat_template can't be set",
    ),
}


async def test_bad_requests_name_the_field(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        for name, (path, body, param, message) in BAD.items():
            for stream in (False, True):
                if stream and "stream_options" in body:
                    continue
                status, error = await h.refused(path, **{"stream": stream, **body})
                assert status == 400, (name, error)
                assert error["type"] == "invalid_request_error", name
                assert (error["param"] or "").startswith(param or ""), (name, error)
                assert message in error["message"], (name, error)
        assert not h.house.prefills[0].requests


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"model": "scripted", "prompt": "\xff"}',
        b'{"model": "scripted", "prompt": "\\ud800"}',
        b'{"model": "scripted", "prompt": "a", "temperature": NaN}',
        b'{"model": "scripted", "prompt": "a", "temperature": 1e999}',
        b'{"model": "scripted", "prompt": "a", "max_tokens": true}',
        b'{"model": null, "prompt": "a"}',
        b'{"model": "scripted", "prompt": ' + b"[" * 100_000,
        b'{"model": "scripted", "prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:60]),
)
async def test_what_is_no_request(tokens: Tokens, body: bytes) -> None:
    async with http_house(tokens) as h:
        status, error = error_of(await h.raw.post(COMPLETIONS, content=body))
        assert status == 400
        assert error["type"] == "invalid_request_error"


async def test_long_and_slow_bodies(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    async with http_house(tokens) as h:
        long = json.dumps({"model": MODEL, "prompt": "x" * MAX_BODY_BYTES}).encode()

        async def pieces():
            for start in range(0, len(long), 1 << 20):
                yield long[start : start + (1 << 20)]

        assert error_of(await h.raw.post(COMPLETIONS, content=long))[0] == 413
        assert error_of(await h.raw.post(COMPLETIONS, content=pieces()))[0] == 413  # without a length
        zipped = await h.raw.post(COMPLETIONS, content=b"x", headers={"content-encoding": "gzip"})
        assert error_of(zipped)[0] == 415

        monkeypatch.setattr("gateway.http.exchange.BODY_TIMEOUT_S", 0.2)

        async def never():
            yield b"{"
            await asyncio.sleep(5)

        assert error_of(await h.raw.post(COMPLETIONS, content=never()))[0] == 408


async def test_other_pages(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        assert error_of(await h.raw.get("/v1/nothing"))[0] == 404
        assert error_of(await h.raw.get(COMPLETIONS))[0] == 405
        assert error_of(await h.raw.post("/v1/models"))[0] == 405
        for name in ("nobody", "a/b", "%00"):
            assert error_of(await h.raw.get(f"/v1/models/{name}"))[0] == 404


async def test_an_unknown_model(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        with pytest.raises(openai.NotFoundError) as caught:
            await h.openai.completions.create(model="nobody", prompt="a")
        assert caught.value.code == "model_not_found"
        for name in (MODEL, "tiny"):  # what the workers say, and what the configuration says
            await h.openai.completions.create(model=name, prompt="a", max_tokens=1)


async def test_full(tokens: Tokens) -> None:
    async with http_house(tokens, decodes=[ScriptedDecode(pace_s=0.1)], max_requests=2) as h:
        stream = await h.openai.completions.create(model=MODEL, prompt="a", max_tokens=100, stream=True)
        response = await h.post(COMPLETIONS, prompt=["a", "b"], max_tokens=1)  # two of them are too many
        status, error = error_of(response)
        assert (status, error["code"]) == (429, "rate_limit_exceeded")
        assert response.headers["retry-after"] == "1"
        await h.openai.completions.create(model=MODEL, prompt="a", max_tokens=1)
        await stream.close()


async def test_no_room_until_the_deadline(tokens: Tokens) -> None:
    async with http_house(tokens, decodes=[ScriptedDecode(capacity=0)], request_timeout_s=0.5) as h:
        with pytest.raises(openai.RateLimitError, match="busy until the deadline") as caught:
            await h.openai.completions.create(model=MODEL, prompt="a")
        assert caught.value.response.headers["retry-after"] == "1"


async def test_too_late(tokens: Tokens) -> None:
    async with http_house(tokens, [ScriptedPrefill(hang=True)], request_timeout_s=0.5) as h:
        for stream in (False, True):
            status, error = await h.refused(COMPLETIONS, prompt="a", stream=stream)
            assert (status, error["type"], error["code"]) == (504, "server_error", "timeout")


async def test_workers_that_cannot(tokens: Tokens) -> None:
    failing = ScriptedDecode(failing=10, after=0, failure=RpcFailure(grpc.StatusCode.INTERNAL, "scripted"))
    prefill = ScriptedPrefill(failures=[RpcFailure(grpc.StatusCode.INTERNAL, "scripted")] * 2)
    async with http_house(tokens, [prefill], [failing], max_attempts=1) as h:
        status, error = await h.refused(COMPLETIONS, prompt="a")
        assert (status, error["code"]) == (503, "service_unavailable")


async def test_an_error_in_the_middle_of_a_stream(tokens: Tokens) -> None:
    failing = ScriptedDecode(failing=1, after=3, failure=RpcFailure(grpc.StatusCode.INTERNAL, "scripted"))
    async with http_house(tokens, decodes=[failing], max_attempts=1) as h:
        events = await h.events(COMPLETIONS, prompt=list(PROMPT), max_tokens=20)
        assert [set(event) == {"error"} for event in events] == [False] * (len(events) - 1) + [True]
        assert len(events) > 1
        failing.failing = 1
        stream = await h.openai.completions.create(model=MODEL, prompt=list(PROMPT), max_tokens=20, stream=True)
        with pytest.raises(openai.APIError, match="INTERNAL: scripted"):
            async for _ in stream:
                pass


async def test_aborted_by_somebody_else(tokens: Tokens) -> None:
    async with http_house(tokens, decodes=[ScriptedDecode(pace_s=0.05)]) as h:
        task = asyncio.create_task(h.post(COMPLETIONS, prompt="a", max_tokens=100))
        await eventually(lambda: h.house.decodes[0].leases)
        (visit,) = h.house.desk.door.visits
        h.house.desk.door.abort(visit.guest, visit.request_id, "enough")
        status, error = error_of(await task)
        assert (status, error["message"]) == (499, "the request was aborted: enough")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_client_that_goes_away(tokens: Tokens, path: str, stream: bool) -> None:
    """Everything it held is free again soon, on both workers, however far it had come."""
    options = {"max_tokens": 200, "stream": stream, "n": 2, "temperature": 0.5}
    options |= {"prompt": list(PROMPT)} if path == COMPLETIONS else {"messages": USER}
    async with http_house(tokens, [ScriptedPrefill()], [ScriptedDecode(pace_s=0.05)]) as h:
        prefill, decode = h.house.prefills[0], h.house.decodes[0]
        moments = [(5.0, lambda: prefill.running), (0.0, lambda: len(decode.leases) == 2 and not prefill.running)]
        for prefill.slow_s, held in moments:
            task = asyncio.create_task(h.post(path, **options))
            await eventually(held, 5.0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await h.idle()


async def test_a_reader_that_leaves_its_loop(tokens: Tokens) -> None:
    async with http_house(tokens, decodes=[ScriptedDecode(pace_s=0.02)]) as h:
        for _ in range(3):
            stream = await h.openai.completions.create(model=MODEL, prompt="a", max_tokens=200, stream=True)
            async for _chunk in stream:
                break
            await stream.close()
        await h.idle()


async def test_the_server_stops_under_a_stream(tokens: Tokens) -> None:
    async with http_house(tokens, decodes=[ScriptedDecode(pace_s=0.05)]) as h:
        task = asyncio.create_task(h.events(COMPLETIONS, prompt="a", max_tokens=200))
        await eventually(lambda: h.house.decodes[0].leases)
        await asyncio.sleep(0.2)
        h.house.desk.door.close()
        *_, last = await task
        assert "the gateway is stopping" in last["error"]["message"]
        assert (await h.refused(COMPLETIONS, prompt="a"))[0] == 503
        await h.server.stop()


async def test_health(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        assert (await h.raw.get("/health")).json() == {"status": "ok"}
        h.house.backend.pool.suspect(*h.house.backend.pool.workers)
        response = await h.raw.get("/health")
        assert error_of(response)[0] == 503
        assert response.headers["retry-after"] == "1"


async def test_models_and_version(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        models = await h.openai.models.list()
        assert [model.id for model in models.data] == [MODEL]
        assert (await h.openai.models.retrieve(MODEL)).owned_by == "branchline"
        assert models.data[0].max_model_len == 256
        assert set((await h.raw.get("/version")).json()) == {"version"}
    async with http_house(tokens, served_model_name="mine/own") as h:
        assert [model.id for model in (await h.openai.models.list()).data] == ["mine/own"]
        assert (await h.openai.models.retrieve("mine/own")).id == "mine/own"
