"""More models in one release: their configuration, their pods, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from chart import CHART, HelmError, render

from branchline.config import from_mapping
from branchline.config_others import GATEWAY_FIELDS, SECTIONS
from cluster.placement import Plan

EXAMPLE = CHART.parent / "examples" / "several-models.yaml"


def test_the_example_has_a_pod_for_each_worker() -> None:
    rendered = render(None, EXAMPLE)
    (settings,) = (m for m in rendered.manifests if m["kind"] == "ConfigMap" and "config.yaml" in m["data"])
    (cluster,) = (m for m in rendered.manifests if m["kind"] == "RayCluster")
    config = from_mapping(yaml.safe_load(settings["data"]["config.yaml"]))
    assert list(config.each()) == ["", "fast"]
    seats = Plan(config).first()
    for group in cluster["spec"]["workerGroupSpecs"]:
        workers = [seat for seat in seats if seat.role == group["groupName"]]
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == len(workers)
        for seat in workers:  # each fits a pod, of which it takes the whole
            assert group["resources"][seat.claims.resource] == "1"
            assert float(group["resources"]["CPU"]) == seat.claims.num_cpus
            assert float(group["resources"]["GPU"]) == seat.claims.num_gpus
    ports = {seat.config.decode.port for seat in seats if seat.role == "decode"}
    assert len(ports) == 1, "services and network policies name one port"


def test_replicas_are_the_main_models_unless_given() -> None:
    others = {"a": {}, "b": {"prefill": {"replicas": 3}}}
    (cluster,) = (
        m
        for m in render({"config": {"others": others}, "prefill": {"replicas": 2}}).manifests
        if m["kind"] == "RayCluster"
    )
    found = {group["groupName"]: group["replicas"] for group in cluster["spec"]["workerGroupSpecs"]}
    assert (found["prefill"], found["decode"], found["gateway"]) == (2 + 2 + 3, 3, 1)


@pytest.mark.parametrize(
    "other",
    [{"modl": {}}, {"decode": {"replicas": 0}}, {"decode": {"port": 1}}, {"gateway": {"http_port": 1}}, {"ray": {}}, 3],
)
def test_typos_are_refused(other: Any) -> None:
    with pytest.raises(HelmError, match="others"):
        render({"config": {"others": {"x": other}}})


def test_the_schema_has_what_can_differ() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    (other,) = schema["properties"]["config"]["properties"]["others"]["patternProperties"].values()
    assert set(other["properties"]) == {*SECTIONS, "gateway"}
    # Ray tells gateways the addresses.
    assert set(other["properties"]["gateway"]["properties"]) == set(GATEWAY_FIELDS) - {
        "prefill_workers",
        "decode_workers",
    }
