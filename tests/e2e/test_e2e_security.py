"""Real processes with everything on: mutual TLS inside, TLS and API keys outside; and nobody gets in without."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import openai
import pytest
from certificates import Authority, Pair
from e2e_helpers import REQUEST_S, START_S, wait_until, wait_until_idle
from e2e_model import TinyModel

from benchmarks.local_system import REPOSITORY, LocalSystem
from branchline.client import AuthenticationError, BranchlineError, Client, OverloadedError, Tls
from branchline.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

HOST = "127.0.0.1"
PROMPT = "a bad cab "


@dataclass
class Secured:
    system: LocalSystem
    inside: Authority
    outside: Authority
    node: Pair
    #: Keys by name.
    keys: dict[str, str]
    key_file: Path

    @property
    def tls(self) -> Tls:
        return Tls(ca=self.outside.certificate)

    def client(self, name: str) -> Client:
        return Client(self.system.address, api_key=self.keys[name], tls=self.tls)


def made_key(name: str, *flags: str) -> tuple[str, str]:
    """A key and its line, from the command line."""
    command = [sys.executable, "-m", "cluster.cli", "keys", "new", name, *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    key, line = done.stdout.splitlines()
    return key, line


@pytest.fixture(scope="module")
def secured(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directories = [tmp_path_factory.mktemp(name) for name in ("inside", "outside")]
    inside, outside = map(Authority, directories)
    node, gateway = inside.sign("node", "workers.internal"), outside.sign("gateway", HOST)
    made = {"alice": made_key("alice"), "bob": made_key("bob", "--requests-per-minute", "1")}
    key_file = directories[1] / "keys.yaml"
    key_file.write_text("".join(f"{line}\n" for _, line in made.values()))
    config = tiny.config(
        **{
            "gateway.http_port": 0,
            "decode.metrics_port": 0,
            "security.inside.certificate": node.certificate,
            "security.inside.key": node.key,
            "security.inside.ca": inside.certificate,
            "security.inside.server_name": "workers.internal",
            "security.outside.certificate": gateway.certificate,
            "security.outside.key": gateway.key,
            "security.api_keys": str(key_file),
        }
    )
    keys = {name: key for name, (key, _) in made.items()}
    with LocalSystem(config, START_S) as system:
        secured = Secured(system, inside, outside, node, keys, key_file)
        yield secured
        with secured.client("alice") as client:
            wait_until_idle(client)
        logs = "".join(process.log.read_text() for process in system.processes)
        assert not [name for name, key in keys.items() if key in logs]
        assert system.stop() == [0] * len(system.processes)


def test_the_sdk_and_openai_get_the_same_answer(secured: Secured) -> None:
    with secured.client("alice") as client:
        result = client.complete(prompt=PROMPT, max_tokens=12, ignore_eos=True, timeout=REQUEST_S)
        assert result.usage.completion_tokens == 12
        assert result.failovers == 0
        model = client.models()[0].id
        assert all(worker.healthy for worker in client.info().workers)
    context = ssl.create_default_context(cafile=secured.outside.certificate)
    transport = openai.DefaultHttpxClient(verify=context, trust_env=False)
    url = f"https://{secured.system.http}/v1"
    key = secured.keys["alice"]
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=REQUEST_S, http_client=transport) as api:
        answer = api.completions.create(
            model=model, prompt=PROMPT, max_tokens=12, temperature=0.0, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].text == result.text
        with pytest.raises(openai.AuthenticationError):
            api.with_options(api_key="wrong").models.list()


def test_commands_get_in_with_the_flags(secured: Secured, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(secured.keys["alice"] + "\n")
    command = [sys.executable, "-m", "cluster.cli", "info", "--target", secured.system.address, "--json"]
    access = ["--tls-ca", secured.outside.certificate, "--api-key-file", str(tmp_path / "key")]
    environ = {name: value for name, value in os.environ.items() if name != "BRANCHLINE_API_KEY"}

    def run(*flags: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *flags],
            cwd=REPOSITORY,
            env={**environ, **more},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = run(*access)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["workers"]) == 2
    assert run(*access[:2], BRANCHLINE_API_KEY=secured.keys["alice"]).returncode == 0
    refused = run(*access[:2])
    assert (refused.returncode, "API key" in refused.stderr) == (2, True)


def test_keys_have_limits_and_end(secured: Secured) -> None:
    with secured.client("bob") as client:
        client.models()
        with pytest.raises(OverloadedError, match="1 requests a minute") as caught:
            client.models()
        assert 0 < caught.value.retry_after <= 60
    alice = [line for line in secured.key_file.read_text().splitlines() if "alice" in line]
    secured.key_file.write_text("\n".join(alice))
    with secured.client("bob") as client:
        wait_until(lambda: isinstance(refusal(client), AuthenticationError), 10, "the key is revoked")


def refusal(client: Client) -> BranchlineError | None:
    try:
        client.models()
    except BranchlineError as error:
        return error
    return None


def test_a_worker_s_metrics_want_a_certificate(secured: Secured) -> None:
    log = secured.system.decode[0].log.read_text()
    url = next(line.rpartition(" ")[2] for line in log.splitlines() if line.startswith("metrics at https://"))
    trusting = ssl.create_default_context(cafile=secured.inside.certificate)
    trusting.check_hostname = False  # as Prometheus does with `server_name`: the address is not in it
    with pytest.raises((ssl.SSLError, urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(url, timeout=10, context=trusting).read()
    trusting.load_cert_chain(secured.node.certificate, secured.node.key)
    with urllib.request.urlopen(url, timeout=10, context=trusting) as page:
        assert b"branchline_decode_leases" in page.read()
    outside = ssl.create_default_context(cafile=secured.outside.certificate)
    with pytest.raises(urllib.error.HTTPError, match="401"):  # the API's door is in front of that page
        urllib.request.urlopen(f"https://{secured.system.http}/metrics", timeout=10, context=outside)


def test_workers_talk_to_nobody_without_a_certificate(secured: Secured) -> None:
    with secured.client("alice") as client:
        addresses = {worker.role: worker.address for worker in client.info().workers}
    calls = {
        "prefill": (prefill_pb2_grpc.PrefillServiceStub, prefill_pb2.PrefillServiceGetStatusRequest()),
        "decode": (decode_pb2_grpc.DecodeServiceStub, decode_pb2.DecodeServiceGetStatusRequest()),
    }
    ca, certificate, key = (
        Path(path).read_bytes() for path in (secured.inside.certificate, secured.node.certificate, secured.node.key)
    )
    own = secured.outside.sign("stranger", HOST)
    stranger = [Path(path).read_bytes() for path in (own.key, own.certificate)]
    options = [("grpc.ssl_target_name_override", "workers.internal")]
    for role, address in addresses.items():
        stub, request = calls[role]
        for credentials, let_in in (
            (grpc.ssl_channel_credentials(ca, key, certificate), True),
            (grpc.ssl_channel_credentials(ca), False),
            (grpc.ssl_channel_credentials(ca, *stranger), False),
            (None, False),
        ):
            channel = (
                grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address)
            )
            with channel:
                if let_in:
                    assert stub(channel).GetStatus(request, timeout=10).incarnation
                    continue
                with pytest.raises(grpc.RpcError) as caught:
                    stub(channel).GetStatus(request, timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
