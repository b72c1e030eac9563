"""API keys at both interfaces: who comes in, how often, what it sees; and the file, while it changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from gateway_harness import PROMPT
from http_harness import MODEL, HttpHouse, error_of, http_house
from scripted_workers import ScriptedDecode, eventually

from branchline.client import AsyncClient, AuthenticationError, CancelledError, InvalidRequestError, OverloadedError
from branchline.config import ConfigError
from gateway import keys as keys_module
from gateway.door import Call
from gateway.keys import KeyLimits, Keyring, entry_of, hash_of, new_key, read_keys
from gateway.quota import Bucket
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

COMPLETIONS = "/v1/completions"


class KeyFile:
    """The file, and the keys themselves by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, str] = {}
        self._lines: dict[str, str] = {}
        path.write_text("")

    def put(self, name: str, *, operator: bool = False, **limits: int) -> str:
        """Adds a key, or gives one that is there other limits."""
        key = self.keys.setdefault(name, new_key())
        line = entry_of(key, name, KeyLimits(**limits))
        self._lines[name] = line.removesuffix("}") + ", operator: true}" if operator else line
        self._write()
        return key

    def revoke(self, name: str) -> None:
        del self._lines[name]
        self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text("\n".join(self._lines.values()))
        new.replace(self.path)


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.yaml")


@contextlib.asynccontextmanager
async def guarded(tokens: Tokens, file: KeyFile, **settings: Any) -> AsyncIterator[HttpHouse]:
    """A gateway that watches the file."""
    keyring = Keyring(str(file.path))
    async with http_house(tokens, keyring=keyring, **settings) as h:
        watch = asyncio.create_task(keyring.watch(h.house.desk.door.keys_changed))
        yield h
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def post(h: HttpHouse, key: str, **body: Any) -> Any:
    body = {"model": MODEL, "prompt": list(PROMPT), "max_tokens": 2, **body}
    return await h.raw.post(COMPLETIONS, json=body, headers=bearer(key))


async def test_only_known_keys_come_in(tokens: Tokens, file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key, wrong = file.put("alice"), new_key()
    async with guarded(tokens, file) as h:
        async with AsyncClient(h.house.target, api_key=key) as client:
            assert (await client.complete(token_ids=PROMPT, max_tokens=2)).usage.completion_tokens == 2
            assert await client.models()
        for other in (None, wrong, key[:-1], key + "x", hash_of(key), "x" * 256):
            async with AsyncClient(h.house.target, api_key=other) as client:
                assert await client.health()  # load balancers have no key
                for call in (client.models(), client.complete(token_ids=PROMPT), client.tokenize(prompt="a")):
                    with pytest.raises(AuthenticationError, match="API key"):
                        await call
        assert (await post(h, key)).status_code == 200
        assert (await h.openai.with_options(api_key=key).models.list()).data
        with pytest.raises(openai.AuthenticationError, match="not known") as caught:
            await h.openai.models.list()
        assert caught.value.code == "invalid_api_key"
        refused = [await h.raw.get(path) for path in ("/v1/models", f"/v1/models/{MODEL}", "/version")]
        refused += [await h.raw.post(path, content=b"{") for path in (COMPLETIONS, "/v1/chat/completions")]
        refused += [
            await h.raw.get("/v1/models", headers={"authorization": value}) for value in ("Bearer", "Basic x", key)
        ]
        for response in refused:
            assert error_of(response) == (401, {**error_of(response)[1], "type": "authentication_error"})
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await h.raw.get("/health")).status_code == 200
    assert key not in caplog.text
    assert wrong not in caplog.text


async def test_a_call_is_refused_before_it_is_parsed(tokens: Tokens, file: KeyFile) -> None:
    key = file.put("alice")
    async with guarded(tokens, file) as h, grpc.aio.insecure_channel(h.house.target) as channel:
        call = channel.unary_stream("/branchline.v1.GatewayService/Generate")
        for metadata, code in (((), "UNAUTHENTICATED"), (tuple(bearer(key).items()), "INVALID_ARGUMENT")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff" * 100, metadata=metadata).read()
            assert caught.value.code().name == code


async def test_keys_come_and_go_while_it_runs(
    tokens: Tokens, file: KeyFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A revoked key's requests end; what is no key file leaves everything as it was."""
    monkeypatch.setattr(keys_module, "CHECK_INTERVAL_S", 0.02)
    first = file.put("first")
    async with guarded(tokens, file, decodes=[ScriptedDecode(pace_s=0.05)]) as h:
        running = asyncio.create_task(post(h, first, max_tokens=200))
        await eventually(lambda: h.house.decodes[0].leases)
        second = file.put("second")
        await eventually_status(h, second, 200)
        file.revoke("first")
        status, error = error_of(await running)
        assert (status, error["message"]) == (401, "the API key was revoked")
        assert (await post(h, first)).status_code == 401

        good = file.path.read_text()
        for bad in ("- {name: x", "- name: x\n  hash: secret-key-in-the-wrong-place", "nonsense", None):
            caplog.clear()
            if bad is None:
                file.path.unlink()
            else:
                file.path.write_text(bad)
            await eventually(lambda: caplog.records)
            assert "the API keys stay as they were: security.api_keys" in caplog.text
            assert "secret-key" not in caplog.text
            assert (await post(h, second)).status_code == 200
        file.path.write_text(good)
        await asyncio.sleep(0.1)
        assert (await post(h, second)).status_code == 200


async def eventually_status(h: HttpHouse, key: str, status: int) -> None:
    async with asyncio.timeout(5):
        while (await post(h, key)).status_code != status:
            await asyncio.sleep(0.01)


async def test_requests_per_minute(tokens: Tokens, file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "CHECK_INTERVAL_S", 0.02)
    key, other = file.put("alice", requests_per_minute=4), file.put("bob")
    async with guarded(tokens, file) as h, AsyncClient(h.house.target, api_key=key) as client:
        await client.models()
        assert (await post(h, key, prompt=["a", "b"])).status_code == 200  # two prompts are two requests
        await client.models()
        with pytest.raises(OverloadedError, match="this key may make 4 requests a minute") as caught:
            await client.models()
        assert 0 < caught.value.retry_after <= 15
        response = await post(h, key)
        status, error = error_of(response)
        assert (status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert 0 < int(response.headers["retry-after"]) <= 15
        assert (await post(h, other)).status_code == 200  # others have their own
        file.put("alice", requests_per_minute=12)
        await eventually_status(h, key, 200)
        # What never fits is told as a mistake: no waiting would help.
        response = await post(h, key, prompt=["a"] * 14)
        assert error_of(response)[0] == 400


async def test_tokens_per_minute(tokens: Tokens, file: KeyFile) -> None:
    """Prompts and answers count, those under way, too; the answer that goes over the limit is not cut."""
    key = file.put("alice", tokens_per_minute=60)
    async with guarded(tokens, file) as h, AsyncClient(h.house.target, api_key=key) as client:
        await client.complete(token_ids=PROMPT, max_tokens=40)
        result = await client.complete(token_ids=PROMPT, max_tokens=40, n=2, temperature=1.0)
        assert result.usage.completion_tokens == 80
        with pytest.raises(OverloadedError, match="60 tokens a minute") as caught:
            await client.complete(token_ids=PROMPT, max_tokens=1)
        assert 30 < caught.value.retry_after < 70  # 126 tokens were used, of 60
        assert await client.models()  # takes none
    async with (
        guarded(tokens, file, decodes=[ScriptedDecode(pace_s=0.01)]) as h,
        AsyncClient(h.house.target, api_key=key) as client,
        client.generate(token_ids=PROMPT, max_tokens=200) as stream,
    ):
        seen = 0
        async for chunk in stream:
            seen += len(chunk.token_ids)
            if seen > 60:
                break
        with pytest.raises(OverloadedError, match="60 tokens a minute"):
            await client.complete(token_ids=PROMPT, max_tokens=1)


async def test_concurrency(tokens: Tokens, file: KeyFile) -> None:
    key = file.put("alice", concurrency=2)
    async with guarded(tokens, file, decodes=[ScriptedDecode(pace_s=0.05)]) as h:
        async with AsyncClient(h.house.target, api_key=key) as client:
            streams = [client.generate(token_ids=PROMPT, max_tokens=200) for _ in range(2)]
            assert len({await stream.request_id() for stream in streams}) == 2
            with pytest.raises(OverloadedError, match="2 requests running, and has 2") as caught:
                await client.complete(token_ids=PROMPT, max_tokens=1)
            assert caught.value.retry_after == 1.0
            assert error_of(await post(h, key, prompt=["a"] * 3))[0] == 400
            await streams[0].close()
            await eventually_status(h, key, 200)
            await streams[1].close()
        await h.house.idle()
        (quota,) = h.house.desk.door._quotas.values()
        assert quota.running == 0


async def test_a_key_sees_and_ends_its_own_requests(tokens: Tokens, file: KeyFile) -> None:
    alice, bob, operator = file.put("alice"), file.put("bob"), file.put("operator", operator=True)
    async with guarded(tokens, file, decodes=[ScriptedDecode(pace_s=0.05)]) as h, contextlib.AsyncExitStack() as stack:
        clients = [AsyncClient(h.house.target, api_key=key) for key in (alice, bob, operator)]
        a, b, o = [await stack.enter_async_context(client) for client in clients]
        stream = a.generate(token_ids=PROMPT, max_tokens=200)
        request_id = await stream.request_id()
        assert [len((await client.status()).requests) for client in (a, b, o)] == [1, 0, 1]
        with pytest.raises(InvalidRequestError, match="no request"):
            await b.abort(request_id)
        await o.abort(request_id)
        with pytest.raises(CancelledError, match="aborted"):
            async for _ in stream:
                pass


HASH = hash_of("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must be a list of keys"),
        ("- alice", "[0]: must have a name and a hash"),
        ("- {name: alice}", "[0]: must have a name and a hash"),
        (f"- {{name: a b, hash: '{HASH}'}}", "[0].name: must be letters"),
        ("- {name: a, hash: bl-secret}", "[0].hash: must be sha256:"),
        (f"- {{name: a, hash: '{HASH}', limits: {{concurrency: -1}}}}", "[0].limits.concurrency: must not be negative"),
        (f"- {{name: a, hash: '{HASH}', limits: {{typo: 1}}}}", "[0].limits.typo: unknown field"),
        (f"- {{name: a, hash: '{HASH}'}}\n- {{name: b, hash: '{HASH}'}}", "[1].hash: of b is there twice"),
        ("- " + "[" * 5000, "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
    ids=lambda text: text[:30],
)
def test_a_wrong_file_names_the_entry(file: KeyFile, text: str, message: str) -> None:
    file.path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(str(file.path))
    assert message in str(caught.value)
    assert "bl-secret" not in str(caught.value)


def test_keys_are_random_and_not_kept() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 46 and key.startswith("bl-") for key in keys)
    key = keys.pop()
    assert key not in entry_of(key, "alice", KeyLimits())
    call = Call("http", "/", bearer(key))
    assert key not in repr(call)


def test_a_bucket_fills_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("gateway.quota.time.monotonic", lambda: now)
    bucket = Bucket.full(60)
    assert bucket.wait_s(60) == 0
    bucket.take(90)
    assert bucket.wait_s(1) == 31
    now += 31
    assert bucket.wait_s(1) == 0
    assert bucket.wait_s(1000) == 59  # a full one is the most there can be
    bucket.resize(120)
    assert bucket.level == 61
    bucket.resize(30)
    assert bucket.level == -29
    now += 600
    assert bucket.wait_s(30) == 0
