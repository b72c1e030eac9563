"""A whole gateway whose two ports are encrypted: the SDK's clients and HTTP ones, renewal, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from certificates import Authority, Pair
from gateway_harness import PROMPT
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually, expected_tokens, running
from tiny_tokenizer import train

from branchline.client import AsyncClient, Client, InvalidRequestError, Tls, UnavailableError
from branchline.config import Config, ConfigError, from_mapping
from branchline.wire import http_server
from gateway.serve import _warn_of_openness, serve

pytestmark = [pytest.mark.wire, pytest.mark.timeout(120)]

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    train().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 480, "eos_token_id": 0}))
    return str(directory)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@dataclass
class Served:
    grpc: str
    http: str

    async def complete(self, tls: Tls | None) -> list[int]:
        async with AsyncClient(self.grpc, tls=tls) as client:
            return list((await client.complete(token_ids=PROMPT, max_tokens=5, timeout=10)).token_ids)

    async def get(self, authority: Authority, client: Pair | None = None) -> Any:
        """Of the HTTP interface, on a new connection."""
        context = ssl.create_default_context(cafile=authority.certificate)
        if client:
            context.load_cert_chain(client.certificate, client.key)
        async with httpx2.AsyncClient(verify=context, trust_env=False, timeout=10) as http:
            return (await http.get(f"https://{self.http}/health")).json()


def config(model: str, security: dict[str, Any], **gateway: Any) -> Config:
    return from_mapping({"model": {"model": model}, "gateway": {"http_port": 0, **gateway}, "security": security})


@contextlib.asynccontextmanager
async def served(model: str, **outside: str) -> AsyncIterator[Served]:
    ready: list[tuple[str, ...]] = []
    stop = asyncio.Event()
    async with running(ScriptedPrefill()) as (_, p), running(ScriptedDecode()) as (_, d):
        whole = config(model, {"outside": outside}, prefill_workers=[p], decode_workers=[d])
        task = asyncio.create_task(serve(whole, ready=lambda *addresses: ready.append(addresses), stop=stop))
        await eventually(lambda: ready or task.done(), 30)
        try:
            yield Served(*ready[0])
        finally:
            stop.set()
            await asyncio.wait_for(task, 10)


async def test_both_ports_are_encrypted(model: str, authority: Authority, tmp_path: Path) -> None:
    pair = authority.sign("gateway", HOST, "gateway.test")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    async with served(model, certificate=pair.certificate, key=pair.key) as gateway:
        trusted = Tls(ca=authority.certificate)
        pem = Path(authority.certificate).read_bytes()
        for tls in (trusted, Tls(ca=pem), Tls(ca=pem, server_name="gateway.test")):
            assert await gateway.complete(tls) == expected_tokens(PROMPT, 5)
        for wrong in (None, Tls(ca=stranger.certificate), Tls(), Tls(ca=pem, server_name="elsewhere.test")):
            with pytest.raises(UnavailableError):
                await gateway.complete(wrong)

        def synchronous() -> bool:
            with Client(gateway.grpc, tls=trusted) as client, Client(gateway.grpc) as plain:
                assert client.models()[0].id == "scripted"
                return client.health() and not plain.health(timeout=2)

        assert await asyncio.to_thread(synchronous)

        assert await gateway.get(authority) == {"status": "ok"}
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await gateway.get(stranger)
        async with httpx2.AsyncClient(trust_env=False) as http:
            with pytest.raises(httpx2.RemoteProtocolError):
                await http.get(f"http://{gateway.http}/health")

        # A renewal reaches both ports; the old authority's trust in it is worth nothing then.
        renewed = stranger.sign("gateway", HOST)
        Path(pair.certificate).write_bytes(Path(renewed.certificate).read_bytes())
        Path(pair.key).write_bytes(Path(renewed.key).read_bytes())
        assert await gateway.complete(Tls(ca=stranger.certificate)) == expected_tokens(PROMPT, 5)
        assert await gateway.get(stranger) == {"status": "ok"}
        with pytest.raises(UnavailableError):
            await gateway.complete(trusted)
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await gateway.get(authority)


async def test_a_handshake_has_a_deadline(model: str, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "TLS_HANDSHAKE_S", 0.5)
    pair = authority.sign("gateway", HOST)
    async with served(model, certificate=pair.certificate, key=pair.key) as gateway:
        host, _, port = gateway.http.rpartition(":")
        silent, writer = await asyncio.open_connection(host, int(port))
        assert await asyncio.wait_for(silent.read(), 5) == b""
        writer.close()
        assert await gateway.get(authority) == {"status": "ok"}


async def test_clients_may_need_certificates(model: str, authority: Authority, tmp_path: Path) -> None:
    pair = authority.sign("gateway", HOST)
    (tmp_path / "clients").mkdir()
    clients = Authority(tmp_path / "clients")
    alice, stranger = clients.sign("alice"), authority.sign("stranger")
    outside = {"certificate": pair.certificate, "key": pair.key, "client_ca": clients.certificate}
    async with served(model, **outside) as gateway:
        ca = authority.certificate
        assert await gateway.complete(Tls(ca, alice.certificate, alice.key)) == expected_tokens(PROMPT, 5)
        assert await gateway.get(authority, alice) == {"status": "ok"}
        for tls in (Tls(ca), Tls(ca, stranger.certificate, stranger.key)):
            with pytest.raises(UnavailableError):
                await gateway.complete(tls)
        for client in (None, stranger):
            with pytest.raises((httpx2.ReadError, httpx2.ConnectError, httpx2.RemoteProtocolError)):
                await gateway.get(authority, client)
        # Who may sign clients can change while it runs, too.
        Path(clients.certificate).write_bytes(Path(authority.certificate).read_bytes())
        assert await gateway.complete(Tls(ca, stranger.certificate, stranger.key)) == expected_tokens(PROMPT, 5)
        assert await gateway.get(authority, stranger) == {"status": "ok"}
        with pytest.raises(UnavailableError):
            await gateway.complete(Tls(ca, alice.certificate, alice.key))
        with pytest.raises((httpx2.ReadError, httpx2.ConnectError, httpx2.RemoteProtocolError)):
            await gateway.get(authority, alice)


@pytest.mark.parametrize(
    ("security", "message"),
    [
        (
            {"outside": {"certificate": "/nowhere", "key": "/nowhere"}},
            "security.outside.certificate: /nowhere: No such",
        ),
        ({"inside": {"certificate": "/no", "key": "/no", "ca": "/no"}}, "security.inside.ca: /no: No such file"),
        ({"api_keys": "/nowhere"}, "security.api_keys: /nowhere: No such file"),
    ],
    ids=str,
)
async def test_missing_files_are_told_at_once(model: str, security: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await serve(config(model, security), ready=lambda *_: None, stop=asyncio.Event())
    assert str(caught.value).startswith(message)


def test_an_open_gateway_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for security, host in (({}, "127.0.0.1"), ({}, "localhost"), ({"api_keys": "keys.yaml"}, "0.0.0.0")):
            _warn_of_openness(config("default", security, host=host))
        assert not caplog.records
        _warn_of_openness(config("default", {}, host="0.0.0.0"))
    assert "listens on 0.0.0.0 and needs no API key" in caplog.text


def test_an_sdk_client_names_what_is_wrong() -> None:
    with pytest.raises(InvalidRequestError, match=r"tls\.key: certificate and key go together"):
        Tls(certificate="a.pem")
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidRequestError, match=r"tls\.ca: /nowhere: No such file"):
            kind("127.0.0.1:1", tls=Tls(ca="/nowhere"))
        for key in ("", "two words", "line\n", "ünicode", "x" * 257, b"bytes"):
            with pytest.raises(InvalidRequestError, match=r"^api_key: must be") as caught:
                kind("127.0.0.1:1", api_key=key)
            assert not key or str(key) not in str(caught.value)
    assert "secret" not in repr(Tls(certificate=b"public", key=b"secret"))
