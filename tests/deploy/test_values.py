"""What values are refused, and with what words; that schema and README agree with values and program."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from chart import CHART, PACKAGES, HelmError, Manifest, template

from branchline.config import Config, ConfigError, from_mapping
from tools import chart_readme

#: Fields of the program's configuration that the chart fills in, or that nobody sets on a Ray cluster.
FILLED_IN = {
    *("replicas", "host", "port", "grpc_port", "http_port", "metrics_port", "num_cpus", "num_gpus", "resource"),
}
#: Sections that the chart makes of its own `security` and `ports`.
FILLED_SECTIONS = {"control", "security"}
NOT_FOR_RAY = {"detached", "prefill_workers", "decode_workers", "address"}


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
        ({"ports": {"http": 50051}}, ["ports.gateway and ports.http are both 50051"]),
        ({"ports": {"http": -1}}, ["ports", "http"]),
        ({"ports": {"prefill": 10500}}, ["ports.prefill: 10500 is a port of Ray's own"]),
        ({"ports": {"gateway": 8265}}, ["ports.gateway: 8265 is a port of Ray's own"]),
        ({"config": {"model": {"device": "cuda"}}}, ["prefill.gpus is 0, but config.model.device is cuda"]),
        (
            {"config": {"model": {"device": "cpu"}}, "decode": {"gpus": 1}},
            ["decode.gpus is 1, but config.model.device is cpu"],
        ),
        ({"huggingFace": {"token": "a", "existingSecret": "b"}}, ["huggingFace.token and huggingFace.existingSecret"]),
        ({"rayAuth": {"enabled": False, "existingSecret": "b"}}, ["rayAuth.existingSecret", "rayAuth.enabled"]),
        ({"modelCache": {"existingClaim": "b"}}, ["modelCache.existingClaim", "modelCache.persistent"]),
        ({"security": {"outside": {"enabled": True}}}, ["security.outside.enabled needs security.outside.secret"]),
        ({"security": {"inside": {"enabled": True}}}, ["security.inside.enabled needs security.inside.secret"]),
        (
            {"security": {"outside": {"secret": "s"}}},
            ["security.outside.secret is given", "nothing would be encrypted"],
        ),
        ({"security": {"outside": {"clientCa": True}}}, ["security.outside.clientCa", "enabled is false"]),
        ({"security": {"apiKey": {"secret": "s"}}}, ["security", "apiKey"]),
        (
            {"security": {"inside": {"certManager": {"issuer": "i"}}}},
            ["security.inside.certManager.issuer is given, but security.inside.enabled is false"],
        ),
        (
            {"security": {"outside": {"enabled": True, "secret": "s", "certManager": {"issuer": "i"}}}},
            ["needs security.outside.certManager.dnsNames"],
        ),
        (
            {
                "monitoring": {"serviceMonitor": {"enabled": True}},
                "ports": {"metrics": 9101},
                "networkPolicy": {"scrapers": [{"podSelector": {}}]},
                "security": {"outside": {"enabled": True, "secret": "s"}},
            },
            ["with security.outside needs monitoring.serviceMonitor.gatewayTls"],
        ),
        ({"routes": {"grpc": {"enabled": True}}}, ["routes.grpc.enabled needs routes.grpc.parentRefs"]),
        ({"routes": {"http": {"enabled": True, "timeout": "soon"}}}, ["routes", "http", "timeout"]),
        (
            {"routes": {kind: {"enabled": True, "parentRefs": [{"name": "g"}]} for kind in ("grpc", "http")}},
            ["routes.grpc and routes.http share their Gateways"],
        ),
        (
            {
                "routes": {
                    kind: {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.b", kind]}
                    for kind in ("grpc", "http")
                }
            },
            ["both have the host name a.b"],
        ),
        ({"ingress": {"grpc": {"enabled": True}}}, ["ingress.grpc.enabled needs ingress.grpc.host"]),
        (
            {"ingress": {"http": {"enabled": True, "host": "a.b"}}, "ports": {"http": 0}},
            ["ingress.http.enabled is true, but ports.http is 0"],
        ),
        (
            {"ingress": {kind: {"enabled": True, "host": "a.b"} for kind in ("grpc", "http")}},
            ["ingress.grpc.host and ingress.http.host are both a.b"],
        ),
        (
            {"ingress": {"grpc": {"enabled": True, "host": "a.b"}}, "networkPolicy": {"clients": []}},
            ["a way in for grpc", "networkPolicy.clients lets nobody call"],
        ),
        ({"gcsFaultTolerance": {"enabled": True}}, ["gcsFaultTolerance.enabled needs gcsFaultTolerance.redisAddress"]),
        ({"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis"}}, ["gcsFaultTolerance", "redisAddress"]),
        ({"gcsFaultTolerance": {"redisAddress": "redis:6379"}}, ["a Redis is given"]),
        ({"ports": {"metrics": 8080}}, ["ports.metrics: 8080 is a port of Ray's own"]),
        ({"monitoring": {"rules": {"enabled": True}}}, ["monitoring.rules.enabled is true, but ports.metrics is 0"]),
        (
            {"monitoring": {"serviceMonitor": {"enabled": True}}, "ports": {"metrics": 9101}},
            ["networkPolicy.scrapers lets nobody scrape"],
        ),
        ({"decode": {"maxReplicas": 2}}, ["decode.minReplicas and maxReplicas need autoscaling.enabled"]),
        ({"autoscaling": {"enabled": True}}, ["no role has minReplicas or maxReplicas"]),
        (
            {"autoscaling": {"enabled": True}, "decode": {"replicas": 3, "maxReplicas": 2}},
            ["decode.maxReplicas is 2, but 3 pods are needed at the start"],
        ),
        (
            {"autoscaling": {"enabled": True}, "prefill": {"minReplicas": 2}},
            ["prefill.minReplicas is 2, but only 1 pods are needed at the start"],
        ),
        ({"gateway": {"drainSeconds": -1}}, ["gateway", "drainSeconds"]),
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


#: What JSON Schema calls the types of the configuration's fields.
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", tuple: "array"}


def sections() -> Iterator[tuple[str, dict[str, Any], Manifest]]:
    """Each section of the configuration: its name, its fields' types, and what the schema says of them."""
    hints = typing.get_type_hints(Config)
    described = schema()["properties"]["config"]["properties"]
    assert set(described) == set(hints) - FILLED_SECTIONS
    del described["others"]  # tests/deploy/test_several_models.py
    for name, section in described.items():
        yield name, typing.get_type_hints(hints[name]), section["properties"]


def test_the_schema_knows_the_programs_fields_and_no_others() -> None:
    for name, hints, described in sections():
        assert set(described) == set(hints) - FILLED_IN - NOT_FOR_RAY, name
        for field, said in described.items():
            kind = TYPES[typing.get_origin(hints[field]) or hints[field]]
            assert said.get("type", kind) == kind, f"{name}.{field}"


def test_the_schemas_limits_are_the_programs() -> None:
    checked = 0
    for name, _, described in sections():
        for field, said in described.items():

            def accepted(value: object, where: tuple[str, str] = (name, field)) -> bool:
                try:
                    return bool(from_mapping({where[0]: {where[1]: value}}))
                except ConfigError:
                    return False

            for value in said.get("enum", []):
                assert accepted(value), f"{name}.{field}"
            limits = [(said[key], step) for key, step in (("minimum", -1), ("maximum", 1)) if key in said]
            for limit, step in limits:
                assert accepted(limit), f"{name}.{field}"
                assert not accepted(limit + step), f"{name}.{field}"
            if "exclusiveMinimum" in said:
                assert not accepted(said["exclusiveMinimum"]), f"{name}.{field}"
            if "enum" in said:
                assert not accepted("other"), f"{name}.{field}"
            checked += bool(limits) or "exclusiveMinimum" in said or "enum" in said
    assert checked > 15


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
