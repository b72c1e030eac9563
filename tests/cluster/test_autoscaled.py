"""Ray's autoscaler brings and removes nodes as workers come and go: the chart's own groups, with processes for pods."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from chart import render
from cluster_helpers import HERE, ROOT, free_port, nothing_left, wait_until
from ray.autoscaler._private.fake_multi_node import node_provider
from ray.autoscaler._private.kuberay import autoscaling_config
from ray_nodes import ray_head, remove_all

from branchline.config import Config, from_mapping
from cluster import steering
from cluster.placement import Plan
from cluster.supervisor import Supervisor

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

ROLES = {"prefill": "cluster_roles:worker", "decode": "cluster_roles:worker", "gateway": "cluster_roles:gateway"}
VALUES = {"autoscaling": {"enabled": True, "idleSeconds": 5}, "decode": {"maxReplicas": 2}}
HEAD = node_provider.FAKE_HEAD_NODE_TYPE
#: KubeRay's own variable for the second version, how often it looks, and what Ray's provider of processes wants.
ENV = {
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_CLOUD_INSTANCE_ID": node_provider.FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_provider.FAKE_HEAD_NODE_ID,
}


def autoscaling(cluster: dict[str, Any], gcs: str) -> dict[str, Any]:
    """What the autoscaler makes of the RayCluster, with Ray's provider that starts processes in place of KubeRay's."""
    cluster["metadata"]["namespace"] = "here"
    made = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    kinds = made["available_node_types"]
    kinds[HEAD] = kinds.pop(made["head_node_type"])
    for kind in kinds.values():
        del kind["resources"]["memory"]  # nobody claims it, and the provider below can't offer it
        kind["resources"]["object_store_memory"] = 100 << 20
    own = f"{node_provider.__name__}.{node_provider.FakeMultiNodeProvider.__name__}"
    provider = {"type": "external", "module": own, "launch_multiple": True, "gcs_address": gcs}
    return {**made, "head_node_type": HEAD, "provider": {**made["provider"], **provider}}


@pytest.fixture
def config() -> Iterator[Config]:
    """The rendered configuration, on a Ray that the autoscaler keeps."""
    objects = render(VALUES)
    with nothing_left() as directory:
        file = directory / "autoscaling.json"
        port = free_port()
        file.write_text(json.dumps(autoscaling(objects.get("RayCluster"), f"127.0.0.1:{port}")))
        flags = {"num-cpus": 0, "object-store-memory": 100 << 20, "autoscaling-config": file, "port": port}
        try:
            with ray_head(Path(directory), ENV, **flags) as head:
                environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
                ray.init(address=head.gcs, runtime_env={"env_vars": environment}, log_to_driver=False)
                try:
                    yield from_mapping(yaml.safe_load(objects.config))
                finally:
                    ray.shutdown()
        finally:
            remove_all(Path(directory))


def offered() -> Counter[str]:
    """How many nodes offer each role."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Counter(role for role in ROLES for resources in alive if f"branchline_{role}" in resources)


def test_nodes_come_and_go_with_workers(config: Config) -> None:
    lines: list[str] = []
    free = {"engine.threads": 1, "gateway.grpc_port": 0, "prefill.port": 0, "decode.port": 0}
    supervisor = Supervisor(Plan(config.override(**free), serve_paths=ROLES), {}, lines.append)
    try:
        supervisor.start(120)
        assert offered() == {"prefill": 1, "decode": 1, "gateway": 1}

        assert steering.scale(supervisor, {"decode": 2}, 30) == (["decode-1"], [])
        added = supervisor.roster.find("decode-1")
        assert added
        wait_until(lambda: supervisor.round() or added.ready, 120, "a node came for it")
        assert offered() == {"prefill": 1, "decode": 2, "gateway": 1}

        steering.drain(supervisor, "decode-0", 5)
        wait_until(lambda: supervisor.round() or supervisor.roster.find("decode-0") is None, 60, "it has gone")
        wait_until(lambda: supervisor.round() or offered()["decode"] == 1, 90, "its node has gone")
        assert added.ready
    finally:
        supervisor.close(5)
