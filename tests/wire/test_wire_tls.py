"""Mutual TLS between a server and channels, with real certificates, while they are renewed and when they are wrong."""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from certificates import Authority, Pair
from wire_servicers import ScriptedGateway

from branchline.config import ConfigError, from_mapping
from branchline.config_security import InsideTls, OutsideTls
from branchline.v1 import gateway_pb2, gateway_pb2_grpc
from branchline.wire.channels import open_channel
from branchline.wire.server import RpcServer, is_loopback
from branchline.wire.tls import ServerFiles, channel_tls, inside_files, outside_files, server_credentials

pytestmark = pytest.mark.timeout(60)

HOST = "127.0.0.1"
#: What the servicer says to a call that has got as far as that.
THROUGH = "UNIMPLEMENTED"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def inside(authority: Authority, pair: Pair, server_name: str = "") -> InsideTls:
    return InsideTls(pair.certificate, pair.key, authority.certificate, server_name)


@contextlib.asynccontextmanager
async def serving(files: ServerFiles | None) -> AsyncIterator[str]:
    server = RpcServer(HOST, 0, server_credentials(files))
    add = gateway_pb2_grpc.add_GatewayServiceServicer_to_server
    server.add("branchline.v1.GatewayService", ScriptedGateway(), add)
    yield await server.start()
    await server.stop(grace_s=0)


async def ask(address: str, tls: InsideTls) -> str:
    """How a call ends, on a connection of its own."""
    async with open_channel(address, shared=False, tls=channel_tls(tls)) as channel:
        try:
            await gateway_pb2_grpc.GatewayServiceStub(channel).GetInfo(gateway_pb2.GetInfoRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    raise AssertionError("the servicer does not offer this")


async def test_only_who_has_a_certificate_of_the_authority_gets_through(authority: Authority, tmp_path: Path) -> None:
    tls = inside(authority, authority.sign("node", HOST))
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    stranger = other.sign("stranger", HOST)
    async with serving(inside_files(tls)) as address:
        assert await ask(address, tls) == THROUGH
        assert await ask(address, InsideTls()) == "UNAVAILABLE"  # plain text
        # A server that it does not trust; one that does not trust it; one that wants a certificate and gets none.
        assert await ask(address, InsideTls(tls.certificate, tls.key, other.certificate)) == "UNAVAILABLE"
        assert await ask(address, InsideTls(stranger.certificate, stranger.key, tls.ca)) == "UNAVAILABLE"
        bare = grpc.ssl_channel_credentials(Path(tls.ca).read_bytes())
        async with grpc.aio.secure_channel(address, bare) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await gateway_pb2_grpc.GatewayServiceStub(channel).GetInfo(gateway_pb2.GetInfoRequest(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await ask(address, tls) == THROUGH
    async with serving(None) as address:
        assert await ask(address, tls) == "UNAVAILABLE"


async def test_the_name_in_the_certificate_counts(authority: Authority) -> None:
    worker = authority.sign("worker", "workers.internal")
    async with serving(inside_files(inside(authority, worker))) as address:
        assert await ask(address, inside(authority, worker)) == "UNAVAILABLE"  # it is not for 127.0.0.1
        assert await ask(address, inside(authority, worker, "elsewhere.internal")) == "UNAVAILABLE"
        assert await ask(address, inside(authority, worker, "workers.internal")) == THROUGH


async def test_renewed_certificates_are_taken_without_a_restart(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files are replaced one by one; in between, and while they are damaged, the old ones stay in use."""
    tls = inside(authority, authority.sign("node", HOST))
    served = authority.sign("served", HOST)
    async with serving(ServerFiles("security.inside", served.certificate, served.key, tls.ca)) as address:
        first = shown(address)
        old_key = Path(served.key).read_bytes()
        new_key = Path(authority.sign("served", HOST).key).read_bytes()
        Path(served.key).write_bytes(old_key)  # so far only the certificate is new
        with caplog.at_level(logging.ERROR):
            assert [shown(address) for _ in range(3)] == [first] * 3
        assert len(caplog.records) == 1
        Path(served.key).write_bytes(new_key)
        second = shown(address)
        assert second != first
        Path(served.certificate).write_text("damaged")
        assert shown(address) == second
        Path(served.certificate).unlink()
        assert shown(address) == second
        # The authority, too: whoever has a certificate of the old one is a stranger then.
        (tmp_path / "next").mkdir()
        other = Authority(tmp_path / "next")
        Path(tls.ca).write_bytes(Path(other.certificate).read_bytes())
        served = authority.sign("served", HOST)
        assert await ask(address, tls) == "UNAVAILABLE"


def shown(address: str) -> str:
    """The certificate that a server shows now, on a new connection."""
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"outside": {"certificate": "a"}}, "security.outside.key: missing, though there is a certificate"),
        ({"outside": {"key": "a"}}, "security.outside.certificate: missing, though there is a key"),
        ({"outside": {"client_ca": "a"}}, "security.outside.certificate: missing, though there is a client_ca"),
        ({"inside": {"certificate": "a", "key": "b"}}, "security.inside.ca: missing"),
        ({"inside": {"server_name": "a"}}, "security.inside.certificate: missing"),
        ({"outside": {"typo": "a"}}, "security.outside.typo: unknown field"),
        ({"outside": "a"}, "security.outside: must be a mapping"),
    ],
    ids=str,
)
def test_contradictions_name_the_field(section: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping({"security": section})
    assert str(caught.value).startswith(message)


def test_files_that_do_not_fit_are_told_at_the_start(authority: Authority, tmp_path: Path) -> None:
    pair, other = authority.sign("a", HOST), authority.sign("b", HOST)
    locked = authority.sign("c", HOST, password=b"secret")
    (tmp_path / "text").write_text("no certificate")
    text = str(tmp_path / "text")
    bad = {
        "security.outside.certificate: /nowhere: No such file": OutsideTls("/nowhere", pair.key),
        "security.outside.key: /nowhere: No such file": OutsideTls(pair.certificate, "/nowhere"),
        f"security.outside.key: {other.key} does not fit": OutsideTls(pair.certificate, other.key),
        f"security.outside.key: {locked.key} does not fit": OutsideTls(locked.certificate, locked.key),
        f"security.outside.key: {pair.key} does not fit the certificate {text}": OutsideTls(text, pair.key),
        f"security.outside.client_ca: {text} is not PEM": OutsideTls(pair.certificate, pair.key, text),
    }
    for message, tls in bad.items():
        with pytest.raises(ConfigError) as caught:
            server_credentials(outside_files(tls))
        assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError, match=r"security.inside.ca: /nowhere: No such file"):
        channel_tls(InsideTls(pair.certificate, pair.key, "/nowhere"))


def test_which_hosts_others_can_reach() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "10.1.2.3")] == (
        [True] * 3 + [False] * 3
    )
