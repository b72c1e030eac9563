"""Several models behind one gateway: each request goes to the workers of the model that it names, and to no others."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import openai
import pytest
from gateway_harness import PROMPT, House
from http_harness import HttpHouse, http_house
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually, expected_tokens, running
from tiny_tokenizer import tiny_tokens

from branchline import client as sdk
from branchline.client import AsyncClient
from gateway.backend import Backend
from gateway.model import Model
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

OTHER = "other/model-2.5"


@contextlib.asynccontextmanager
async def beside(h: House) -> AsyncIterator[tuple[ScriptedPrefill, ScriptedDecode, Model]]:
    """Another model, with workers of its own."""
    prefill, decode = ScriptedPrefill(), ScriptedDecode()
    async with running(prefill) as (_, first), running(decode) as (_, second):
        backend = Backend(replace(h.backend.config, served_model_name=OTHER))
        backend.pool.update([first], [second])
        model = h.desk.add("elsewhere", backend, tiny_tokens())
        await eventually(lambda: model.can_serve)
        try:
            yield prefill, decode, model
            await eventually(lambda: not (decode.leases or backend.pool.in_flight or backend.leases.pending), 3)
        finally:
            await model.close()


@contextlib.asynccontextmanager
async def two_models(tokens: Tokens) -> AsyncIterator[tuple[HttpHouse, ScriptedPrefill, AsyncClient]]:
    async with http_house(tokens) as h, beside(h.house) as (prefill, _, _), AsyncClient(h.house.target) as client:
        yield h, prefill, client


async def test_requests_go_to_the_workers_of_their_model(tokens: Tokens) -> None:
    async with two_models(tokens) as (h, theirs, client):
        ours = h.house.prefills[0]
        options = {"token_ids": PROMPT, "max_tokens": 6}
        for names, prefill in (((None, "scripted", "tiny"), ours), ((OTHER, "elsewhere"), theirs)):
            for name in names:
                before = len(prefill.requests)
                done = await client.complete(**options, model=name)
                assert list(done.token_ids) == expected_tokens(PROMPT, 6)
                await client.complete_chat(messages=[{"role": "user", "content": "hello"}], max_tokens=2, model=name)
                assert len(prefill.requests) == before + 2
        assert (len(ours.requests), len(theirs.requests)) == (6, 4)


async def test_over_http_too(tokens: Tokens) -> None:
    async with two_models(tokens) as (h, theirs, _):
        for model in ("scripted", OTHER):
            done = await h.openai.completions.create(model=model, prompt="hello", max_tokens=2, stream=False)
            assert done.model == model
            chat = await h.openai.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=2, stream=True
            )
            assert {chunk.model async for chunk in chat} == {model}
        assert (len(h.house.prefills[0].requests), len(theirs.requests)) == (2, 2)
        assert [model.id async for model in h.openai.models.list()] == ["scripted", OTHER]
        assert (await h.openai.models.retrieve(OTHER)).id == OTHER
        with pytest.raises(openai.NotFoundError) as caught:
            await h.openai.completions.create(model="third", prompt="hello")
        assert caught.value.code == "model_not_found"


async def test_tokens_are_the_models_own(tokens: Tokens) -> None:
    async with two_models(tokens) as (h, _, client):
        for call in (
            client.complete(prompt="a", model="third"),
            client.tokenize(prompt="a", model="third"),
            client.detokenize([1], model="third"),
        ):
            with pytest.raises(sdk.InvalidRequestError, match=f"'third' is not served here; served are .*{OTHER}"):
                await call
        ids = await client.tokenize(prompt="hello", model=OTHER)
        assert await client.detokenize(ids, model=OTHER) == "hello"
        h.house.desk.models[1].tokens.vocab_size = 2  # as if it had a smaller vocabulary
        with pytest.raises(sdk.InvalidRequestError, match="not below the vocabulary size of 2"):
            await client.detokenize([5], model=OTHER)
        await client.detokenize([5])


async def test_all_are_shown(tokens: Tokens) -> None:
    async with two_models(tokens) as (h, _, client):
        assert await client.models() == (
            sdk.Model("scripted", 256, ("tiny",)),
            sdk.Model(OTHER, 256, ("scripted", "elsewhere")),
        )
        info = await client.info()
        assert info.model == "scripted"
        assert [(worker.role, worker.model) for worker in info.workers] == [
            (role, model) for model in ("scripted", OTHER) for role in ("prefill", "decode")
        ]
        workers = "branchline_gateway_workers"
        for model in ("tiny", OTHER):
            labels = {"role": "decode", "state": "up", "model": model}
            assert h.house.desk.registry.get_sample_value(workers, labels) == 1


async def test_one_without_workers_leaves_the_other_alone(tokens: Tokens) -> None:
    async with http_house(tokens, worker_wait_s=0.2) as h, beside(h.house) as (_, _, model):
        model.backend.pool.update([], [])
        async with AsyncClient(h.house.target, retries=0) as client:
            with pytest.raises(sdk.UnavailableError):
                await client.complete(prompt="a", model=OTHER)
            assert (await client.complete(token_ids=PROMPT, max_tokens=3)).text
        assert (await h.raw.get("/health")).status_code == 200
