"""The chart as a whole: every example and a matrix of switches, with both versions of Helm, against the schemas."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from chart import CHART, EXAMPLES, PACKAGES, Manifest, helm, render, template, validate

from branchline import config as program

MAJORS = sorted(PACKAGES)

#: Each switch with what it is set to other than its default.
SWITCHES: dict[str, Manifest] = {
    "no ray auth": {"rayAuth": {"enabled": False}},
    "own ray auth": {"rayAuth": {"existingSecret": "ray"}},
    "no policies": {"networkPolicy": {"enabled": False}},
    "downloads": {"networkPolicy": {"modelDownload": True}},
    "nobody calls": {"networkPolicy": {"clients": []}},
    "no budgets": {"podDisruptionBudgets": {"enabled": False}},
    "token": {"huggingFace": {"token": "hf_x"}},
    "own token": {"huggingFace": {"existingSecret": "hf", "key": "hub"}},
    "cache": {"modelCache": {"persistent": True, "storageClassName": "nfs", "keep": False}},
    "own cache": {"modelCache": {"persistent": True, "existingClaim": "models"}},
    "no account": {"serviceAccount": {"create": False}},
    "service": {"service": {"type": "LoadBalancer", "annotations": {"a/b": "c"}}},
    "pods": {"podLabels": {"team": "x"}, "podAnnotations": {"y": "z"}, "env": {"HF_HUB_OFFLINE": "1"}},
    "pull": {"imagePullSecrets": ["registry"], "image": {"tag": "1", "pullPolicy": "Always"}},
    "name": {"fullnameOverride": "other"},
    "no http": {"ports": {"http": 0}},
    "no drain": {"gateway": {"drainSeconds": 0}},
    "grpc route": {"routes": {"grpc": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.b"]}}},
    "http route": {"routes": {"http": {"enabled": True, "parentRefs": [{"name": "g"}]}}},
    "grpc ingress": {
        "ingress": {"grpc": {"enabled": True, "host": "a.b", "className": "c", "annotations": {"d": "e"}}}
    },
    "http ingress": {"ingress": {"http": {"enabled": True, "host": "a.b", "tlsSecret": "s"}}},
    "outside": {"security": {"outside": {"enabled": True, "secret": "s", "clientCa": True}}},
    "inside": {"security": {"inside": {"enabled": True, "secret": "s"}}},
    "certificate": {"security": {"inside": {"enabled": True, "secret": "s", "certManager": {"issuer": "i"}}}},
    "keys": {"security": {"apiKeys": {"secret": "s"}}},
    "metrics": {
        "ports": {"metrics": 9101},
        "networkPolicy": {"scrapers": [{"namespaceSelector": {}}]},
        "monitoring": {name: {"enabled": True} for name in ("serviceMonitor", "rules", "dashboard")},
    },
    "autoscaling": {"autoscaling": {"enabled": True}, "decode": {"maxReplicas": 2}},
    "redis": {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379", "passwordSecret": "s"}},
}


def merged(values: tuple[Manifest, ...]) -> Manifest:
    whole: dict[str, Any] = {}
    for part in values:
        for key, value in copy.deepcopy(part).items():
            whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
    return whole


@pytest.mark.parametrize("major", MAJORS)
def test_lint(major: int) -> None:
    for example in EXAMPLES:
        assert "0 chart(s) failed" in helm(major, "lint", "--strict", str(CHART), "--values", str(example))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples(example: Path) -> None:
    rendered = [template(major, None, example) for major in MAJORS]
    assert rendered[0] == rendered[1]
    for manifest in rendered[0].manifests:
        validate(manifest)


@pytest.mark.parametrize(
    "names", [*itertools.combinations(SWITCHES, 1), ("cache", "token", "downloads", "pods", "keys", "redis")], ids=str
)
def test_switches(names: tuple[str, ...]) -> None:
    values = merged(tuple(SWITCHES[name] for name in names))
    rendered = [template(major, values) for major in MAJORS]
    assert rendered[0] == rendered[1]
    assert rendered[0] != render(), "the switch does nothing"
    for manifest in rendered[0].manifests:
        validate(manifest)


def test_names_are_unique_and_within_the_release() -> None:
    keys = [(m["kind"], m["metadata"]["name"]) for m in render().manifests]
    assert len(set(keys)) == len(keys)
    assert all(name == "demo" or name.startswith("demo-") for _, name in keys)


def test_a_long_name_leaves_room_for_what_kuberay_appends() -> None:
    objects = render({"fullnameOverride": "a" * 40})
    (cluster,) = objects.names("RayCluster")
    assert len(f"{cluster}-head-svc") <= 50


def test_the_validation_can_fail() -> None:
    objects = render()
    cluster = copy.deepcopy(objects.get("RayCluster"))
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="livenesProbe"):
        validate(cluster)
    service = copy.deepcopy(objects.get("Service", "gateway"))
    service["spec"]["selectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(service)


@pytest.mark.parametrize("example", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_the_program_reads_the_configuration(example: Path | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(render(None, *([example] if example else [])).config)
    config = program.load(file)
    assert (config.decode.resource, config.decode.host) == ("branchline_decode", "0.0.0.0")
    assert (config.gateway.grpc_port, config.gateway.http_port) == (50051, 8000)


def test_without_http_there_is_none(tmp_path: Path) -> None:
    objects = render({"ports": {"http": 0}})
    (tmp_path / "config.yaml").write_text(objects.config)
    assert program.load(tmp_path / "config.yaml").gateway.http_port == -1
    assert [port["name"] for port in objects.get("Service", "gateway")["spec"]["ports"]] == ["grpc"]
    assert len(objects.get("NetworkPolicy", "clients")["spec"]["ingress"][0]["ports"]) == 1
