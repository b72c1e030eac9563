"""What the documents show works: links lead somewhere, code compiles, names, flags and fields exist."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from branchline.config import from_mapping, load
from branchline.config_security import InsideTls
from branchline.v1 import gateway_pb2
from branchline.wire.tls import channel_tls, inside_files
from gateway.http.schemas import ChatRequest, CompletionRequest, StreamOptions
from gateway.keys import KeyLimits
from tools.lock import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "requirements" / "README.md",
    *sorted((ROOT / "deploy").rglob("README.md")),
]


def _block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_field_of_a_request_is_documented() -> None:
    fields = {name for schema in (ChatRequest, CompletionRequest) for name in schema.model_fields}
    fields |= {f"stream_options.{name}" for name in StreamOptions.model_fields}
    missing = {name for name in fields - {"stream_options"} if f"`{name}`" not in API}
    assert not missing


def test_every_rpc_is_documented() -> None:
    methods = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].methods
    assert all(f"`{method.name}`" in API or method.name == "Generate" for method in methods)


def test_the_api_examples_compile() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", API, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "docs/api.md", "exec")


SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_security_page_names_fields_and_code_that_exist() -> None:
    yaml_block, python_block = (
        re.findall(rf"^```{language}\n(.*?)^```", SECURITY, re.DOTALL | re.MULTILINE) for language in ("yaml", "python")
    )
    config = from_mapping(yaml.safe_load(yaml_block[0]))
    assert config.security.outside.on
    assert config.security.inside.on
    compile(python_block[0], "docs/security.md", "exec")
    for name in re.findall(r"`gateway\.(\w+)`", SECURITY):
        assert hasattr(config.gateway, name)
    limits = {field.name for field in dataclasses.fields(KeyLimits)}
    assert set(re.findall(r"^\| `(\w+)` \|", SECURITY, re.MULTILINE)) == limits


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the page's commands are openssl's")
def test_the_certificates_of_the_security_page_are_accepted(tmp_path) -> None:
    commands = re.search(r"^```\n(openssl req.*?)^```", SECURITY, re.DOTALL | re.MULTILINE)
    assert commands is not None
    subprocess.run(["sh", "-ec", commands[1]], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    paths = [str(tmp_path / name) for name in ("node.pem", "node.key", "inside-ca.pem")]
    tls = InsideTls(*paths, server_name="workers.internal")
    files = inside_files(tls)
    assert files is not None
    assert files.context().get_ca_certs()
    assert channel_tls(tls) is not None


def test_the_configurations_by_hand_fit_together() -> None:
    files = set(re.findall(r"--config (\S+\.yaml)", README))
    assert len(files) == 3
    configs = {path: load(ROOT / path) for path in files}
    worker, gateway = configs["deploy/local/worker.yaml"], configs["deploy/local/gateway.yaml"]
    assert gateway.gateway.decode_workers == (f"127.0.0.1:{worker.decode.port}",)
    assert gateway.gateway.prefill_workers == (f"127.0.0.1:{worker.prefill.port}",)
    assert f'Client("127.0.0.1:{gateway.gateway.grpc_port}")' in README


def test_commands_and_flags_exist() -> None:
    shown = re.findall(r"branchline (serve|generate|chat|info)\b(.*)", README)
    shown += [("serve", flags) for flags in re.findall(r'ARGS="(.*)"', README)]
    assert {command for command, _ in shown} == {"serve", "generate", "chat", "info"}
    for command in {command for command, _ in shown}:
        asked = [sys.executable, "-m", "cluster.cli", command, "--help"]
        usage = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
        for flag in re.findall(r"--[a-z-]+", " ".join(flags for name, flags in shown if name == command)):
            assert flag in usage, f"{command} {flag}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= targets


def test_a_python_that_is_too_old_is_told(tmp_path) -> None:
    command = ["make", "install", f"VENV={tmp_path / 'venv'}", "PYTHON=false"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert "needs Python 3.11 or later" in result.stderr
    assert not (tmp_path / "venv").exists()
