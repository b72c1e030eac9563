"""What values are refused, and with what words; that schema and README agree with values and program."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

import pytest
from chart import CHART, PACKAGES, HelmError, Manifest, template

from branchline.config import Config
from tools import chart_readme

#: Fields of the program's configuration that the chart fills in, or that nobody sets on a Ray cluster.
FILLED_IN = {"replicas", "host", "port", "grpc_port", "num_cpus", "num_gpus", "resource"}
NOT_FOR_RAY = {"prefill_workers", "decode_workers", "address"}


@pytest.mark.parametrize("major", sorted(PACKAGES))
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decode": {"replicas": 0}}, ["decode", "replicas", "1"]),
        ({"decod": {"replicas": 1}}, ["decod"]),
        ({"decode": {"replica": 1}}, ["decode", "replica"]),
        ({"prefill": {"gpus": 2}}, ["prefill", "gpus", "1"]),
        ({"prefill": {"memory": "6 Gi"}}, ["prefill", "memory"]),
        ({"config": {"model": {"modle": "x"}}}, ["config", "model", "modle"]),
        ({"config": {"decode": {"port": 1}}}, ["config", "decode", "port"]),
        ({"config": {"engine": {"kv_cache_mib": 0}}}, ["config", "engine", "kv_cache_mib", "1"]),
        ({"tls": {"enabled": True}}, ["tls"]),
        ({"service": {"type": "Loadbalancer"}}, ["service", "type"]),
        ({"fullnameOverride": "Demo"}, ["fullnameOverride"]),
        ({"fullnameOverride": "1st"}, ["fullnameOverride"]),
        ({"ports": {"decode": 50061}}, ["ports.prefill and ports.decode are both 50061"]),
        ({"ports": {"gateway": 50062}}, ["ports.gateway and ports.decode are both 50062"]),
        ({"ports": {"gateway": 8265}}, ["ports.gateway: 8265 is a port of Ray's own"]),
        ({"config": {"model": {"device": "cuda"}}}, ["prefill.gpus is 0, but config.model.device is cuda"]),
        (
            {"config": {"model": {"device": "cpu"}}, "decode": {"gpus": 1}},
            ["decode.gpus is 1, but config.model.device is cpu"],
        ),
        ({"huggingFace": {"token": "a", "existingSecret": "b"}}, ["huggingFace.token and huggingFace.existingSecret"]),
        ({"rayAuth": {"enabled": False, "existingSecret": "b"}}, ["rayAuth.existingSecret", "rayAuth.enabled"]),
        ({"modelCache": {"existingClaim": "b"}}, ["modelCache.existingClaim", "modelCache.persistent"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_refused(major: int, values: Manifest, words: list[str]) -> None:
    with pytest.raises(HelmError) as raised:
        template(major, values)
    message = str(raised.value)
    assert all(word in message for word in words), message


def schema() -> Manifest:
    loaded: Manifest = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    return loaded


def test_the_schema_knows_the_programs_fields_and_no_others() -> None:
    sections = schema()["properties"]["config"]["properties"]
    hints = typing.get_type_hints(Config)
    assert set(sections) == set(hints)
    for name, section in sections.items():
        fields = {field.name for field in dataclasses.fields(hints[name])}
        assert set(section["properties"]) == fields - FILLED_IN - NOT_FOR_RAY, name


def test_every_object_of_the_schema_refuses_unknown_keys_or_lets_all_in() -> None:
    def check(node: Any, path: str) -> None:
        if not isinstance(node, dict):
            return
        if "properties" in node:
            assert node.get("additionalProperties") is False, path
        for key, child in node.get("properties", {}).items():
            check(child, f"{path}.{key}")

    for name, definition in schema()["$defs"].items():
        check(definition, name)
    check(schema(), "")


def test_the_readme_is_current() -> None:
    assert (CHART / "README.md").read_text(encoding="utf-8") == chart_readme.readme(), "run `make chart-readme`"


def test_descriptions_are_read_with_their_paths() -> None:
    text = "# --  Whole.\na:\n  # -- One\n  # line more.\n  b: 1\n  c:\n    # -- Deep.\n    d: [x]\n# not this\ne: 1\n"
    assert dict(chart_readme.described(text)) == {
        ("a",): "Whole.",
        ("a", "b"): "One line more.",
        ("a", "c", "d"): "Deep.",
    }
    assert list(chart_readme.undescribed({"a": {"b": 1}, "e": {}}, {("a", "b")})) == ["e"]
    with pytest.raises(ValueError, match="line 2"):
        list(chart_readme.described("# -- Lost.\n\na: 1\n"))
