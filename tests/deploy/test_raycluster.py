"""The RayCluster: groups, claims, probes, security, scheduling."""

from __future__ import annotations

import pytest
import yaml
from chart import EXAMPLES, Manifest, Objects, render

ROLES = ("prefill", "decode", "gateway")


def example(name: str) -> Objects:
    (file,) = [path for path in EXAMPLES if path.stem == name]
    return render(None, file)


def ray(pod: Manifest) -> Manifest:
    (container,) = pod["spec"]["containers"]
    found: Manifest = container
    return found


def test_a_group_for_each_role_as_large_as_the_configuration_says() -> None:
    objects = example("gpu-4-prefill-8-decode")
    config = yaml.safe_load(objects.config)
    assert set(objects.groups) == set(ROLES)
    for role, group in objects.groups.items():
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == config[role]["replicas"]
    assert [objects.groups[role]["replicas"] for role in ROLES] == [4, 8, 2]


def test_a_pod_offers_exactly_what_one_actor_of_its_role_claims() -> None:
    objects = example("gpu-4-prefill-8-decode")
    config = yaml.safe_load(objects.config)
    for role, group in objects.groups.items():
        claims = {"CPU": config[role]["num_cpus"], "GPU": config[role].get("num_gpus", 0), config[role]["resource"]: 1}
        assert {name: int(count) for name, count in group["resources"].items()} == claims
        # KubeRay takes these from one place only.
        assert not {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"])
        limits = ray(group["template"])["resources"]["limits"]
        assert limits.get("nvidia.com/gpu", 0) == claims["GPU"]


def test_the_head_offers_nothing_to_workers() -> None:
    head = render().get("RayCluster")["spec"]["headGroupSpec"]
    assert head["resources"] == {"CPU": "0"}
    assert "nvidia.com/gpu" not in ray(head["template"])["resources"]["limits"]


def test_probes() -> None:
    objects = render({"config": {"ray": {"start_timeout_s": 905}}})
    config = yaml.safe_load(objects.config)
    for role, group in objects.groups.items():
        container = ray(group["template"])
        port = config[role].get("grpc_port") or config[role]["port"]
        assert container["ports"][0] == {"name": "grpc", "containerPort": port}
        assert container["startupProbe"]["grpc"] == container["readinessProbe"]["grpc"] == {"port": port}
        patience = container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"]
        assert 905 + 60 <= patience < 905 + 80, "a pod waits a little longer than the program does"
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    head = ray(objects.pods["headgroup"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert head[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_a_gateway_is_stopped_when_its_requests_have_ended() -> None:
    pods = render({"gateway": {"drainSeconds": 90}, "ports": {"gateway": 6003}}).pods
    spec = pods["gateway"]["spec"]
    assert ray(pods["gateway"])["lifecycle"]["preStop"]["exec"]["command"] == [
        *("python", "-m", "gateway.drain", "--target=127.0.0.1:6003", "--timeout=90", "--settle=10"),
    ]
    assert spec["terminationGracePeriodSeconds"] == 90 + 30, "Ray's own end comes behind it"
    for name in ("prefill", "decode", "headgroup"):
        assert "lifecycle" not in ray(pods[name])
        assert pods[name]["spec"]["terminationGracePeriodSeconds"] == 30
    assert "lifecycle" not in ray(render({"gateway": {"drainSeconds": 0}}).pods["gateway"])


@pytest.mark.parametrize(
    ("security", "metrics", "command"),
    [
        ({"apiKeys": {"secret": "s"}}, 0, ["sleep", "120"]),
        ({"apiKeys": {"secret": "s"}}, 9100, "--metrics=http://127.0.0.1:9100/metrics"),
        ({"outside": {"enabled": True, "secret": "s"}}, 9100, "--metrics=https://127.0.0.1:9100/metrics"),
        ({"outside": {"enabled": True, "secret": "s", "clientCa": True}}, 9100, ["sleep", "120"]),
    ],
)
def test_a_gateway_that_asks_for_keys_is_asked_for_its_metrics(
    security: Manifest, metrics: int, command: str | list[str]
) -> None:
    """Where they need neither key nor certificate; else nothing in the pod may ask, and the whole time is waited."""
    pod = render({"security": security, "ports": {"metrics": metrics}}).pods["gateway"]
    found = ray(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == (found if isinstance(command, list) else found[3])


def test_the_head_can_keep_its_state_in_a_redis() -> None:
    values: Manifest = {"enabled": True, "redisAddress": "redis.other:6380", "passwordSecret": "s", "passwordKey": "k"}
    peers = [{"namespaceSelector": {}}]
    objects = render({"gcsFaultTolerance": values | {"peers": peers}})
    assert objects.get("RayCluster")["spec"]["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis.other:6380",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
    }
    policy = objects.get("NetworkPolicy", "redis")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": "demo", "ray.io/group": "headgroup"}
    assert policy["policyTypes"] == ["Egress"]
    assert policy["egress"] == [{"to": peers, "ports": [{"protocol": "TCP", "port": 6380}]}]
    anywhere = render({"gcsFaultTolerance": {"enabled": True, "redisAddress": "rediss://redis:6379"}})
    assert anywhere.get("NetworkPolicy", "redis")["spec"]["egress"] == [{"ports": [{"protocol": "TCP", "port": 6379}]}]
    assert anywhere.get("RayCluster")["spec"]["gcsFaultToleranceOptions"] == {"redisAddress": "rediss://redis:6379"}
    assert "gcsFaultToleranceOptions" not in render().get("RayCluster")["spec"]


def test_nothing_runs_as_root_or_writes_to_its_root() -> None:
    for name, pod in render().pods.items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounts
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        homes = {entry["value"] for entry in container["env"] if entry["name"] in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
        assert all(any(home == m or home.startswith(m + "/") for m in mounts) for home in homes), "a home is writable"


def test_pods_keep_their_labels_when_only_the_charts_version_changes() -> None:
    for pod in render().pods.values():
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(pod["metadata"]["labels"])


def test_scheduling() -> None:
    objects = example("gpu-4-prefill-8-decode")
    for role in ("prefill", "decode"):
        spec = objects.pods[role]["spec"]
        assert spec["nodeSelector"] == {"branchline/role": role}
        assert [toleration["key"] for toleration in spec["tolerations"]] == ["nvidia.com/gpu"]
    assert objects.pods["headgroup"]["spec"]["priorityClassName"] == "system-cluster-critical"
    for role in ROLES:
        for constraint in objects.pods[role]["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"] == {"ray.io/cluster": "demo", "ray.io/group": role}
    assert len(objects.pods["gateway"]["spec"]["topologySpreadConstraints"]) == 2


def test_ray_asks_for_a_token() -> None:
    assert render().get("RayCluster")["spec"]["authOptions"] == {"mode": "token"}
    own = render({"rayAuth": {"existingSecret": "mine"}}).get("RayCluster")["spec"]["authOptions"]
    assert own == {"mode": "token", "secretName": "mine"}
    assert "authOptions" not in render({"rayAuth": {"enabled": False}}).get("RayCluster")["spec"]


def test_models_are_kept_on_the_claim_if_there_is_one() -> None:
    def models(values: Manifest, pod: str) -> Manifest:
        volumes = {volume["name"]: volume for volume in render(values).pods[pod]["spec"]["volumes"]}
        found: Manifest = volumes["models"]
        return found

    persistent: Manifest = {"modelCache": {"persistent": True}}
    for role in ROLES:
        assert models(persistent, role)["persistentVolumeClaim"] == {"claimName": "demo-models"}
        assert models({}, role)["emptyDir"] == {"sizeLimit": "50Gi"}
    assert "emptyDir" in models(persistent, "headgroup"), "the head loads no model"
    existing: Manifest = {"modelCache": {"persistent": True, "existingClaim": "shared"}}
    assert models(existing, "decode")["persistentVolumeClaim"] == {"claimName": "shared"}
    assert render(existing).names("PersistentVolumeClaim") == set()
