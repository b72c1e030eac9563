"""Ray's autoscaler in the chart: bounds, its container, its token, its way to the API server."""

from __future__ import annotations

from chart import Manifest, render
from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

VALUES: Manifest = {
    "autoscaling": {"enabled": True, "idleSeconds": 45},
    "prefill": {"maxReplicas": 3},
    "decode": {"replicas": 2, "minReplicas": 1, "maxReplicas": 5, "cpus": 4, "gpus": 1},
    "config": {"others": {"small": {"decode": {"replicas": 1}}}},
}


def test_bounds_are_those_of_the_values() -> None:
    groups = render(VALUES).groups
    found = {name: [group[f"{key}eplicas"] for key in ("minR", "r", "maxR")] for name, group in groups.items()}
    assert found == {"prefill": [2, 2, 3], "decode": [1, 3, 5], "gateway": [1, 1, 1]}


def test_the_autoscaler_reads_what_an_actor_claims() -> None:
    """By Ray's own reading of the object."""
    cluster = render(VALUES).get("RayCluster")
    cluster["metadata"]["namespace"] = "here"
    read = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    decode = read["available_node_types"]["decode"]
    assert (decode["min_workers"], decode["max_workers"]) == (1, 5)
    claims = {name: amount for name, amount in decode["resources"].items() if name != "memory"}
    assert claims == {"CPU": 4, "GPU": 1, "branchline_decode": 1}
    assert read["idle_timeout_minutes"] == 0.75
    assert read["available_node_types"]["headgroup"]["resources"]["CPU"] == 0


def test_only_its_container_has_the_accounts_token() -> None:
    cluster = render(VALUES).get("RayCluster")["spec"]
    spec = cluster["headGroupSpec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    (token,) = [volume for volume in spec["volumes"] if volume["name"] == "kubernetes"]
    files = [source.popitem() for source in token["projected"]["sources"]]
    assert [kind for kind, _ in files] == ["serviceAccountToken", "configMap"]
    (head,) = spec["containers"]
    options = cluster["autoscalerOptions"]
    assert "kubernetes" not in {mount["name"] for mount in head["volumeMounts"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in options["volumeMounts"]}
    assert mounts["kubernetes"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    assert set(mounts) <= {volume["name"] for volume in spec["volumes"]}
    assert options["securityContext"] == head["securityContext"]
    for group in cluster["workerGroupSpecs"]:
        assert "kubernetes" not in {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    # Where Ray looks for it.
    assert f"{mounts['kubernetes']}/token" == node_provider.IN_CLUSTER_TOKEN_PATH
    assert f"{mounts['kubernetes']}/ca.crt" == node_provider.IN_CLUSTER_CA_CERT_PATH


def test_it_reaches_the_api_server_and_the_others_do_not() -> None:
    policy = render(VALUES).get("NetworkPolicy", "autoscaler")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": "demo", "ray.io/group": "headgroup"}
    ports = [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]
    assert policy["egress"] == [{"ports": ports}]
    peers = [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    closer = render({**VALUES, "networkPolicy": {"apiServer": peers}}).get("NetworkPolicy", "autoscaler")["spec"]
    assert closer["egress"] == [{"ports": ports, "to": peers}]
    assert "demo-autoscaler" not in render().names("NetworkPolicy")
    assert "enableInTreeAutoscaling" not in render().get("RayCluster")["spec"]
