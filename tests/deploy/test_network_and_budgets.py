"""Services, network policies, disruption budgets, secrets and claims."""

from __future__ import annotations

import pytest
from chart import Manifest, render

ROLES = ("prefill", "decode", "gateway")
OWN = {"app.kubernetes.io/name": "branchline", "app.kubernetes.io/instance": "demo"}


@pytest.mark.parametrize("role", ROLES)
def test_services_lead_to_their_roles_pods(role: str) -> None:
    objects = render({"ports": {"prefill": 6001, "decode": 6002, "gateway": 6003, "http": 6004}})
    spec = objects.get("Service", role)["spec"]
    assert spec["selector"] == {"ray.io/cluster": "demo", "ray.io/group": role}
    (container,) = objects.pods[role]["spec"]["containers"]
    served = {"grpc": {"prefill": 6001, "decode": 6002, "gateway": 6003}[role]}
    if role == "gateway":
        served["http"] = 6004
    assert {port["targetPort"]: port["port"] for port in spec["ports"]} == served
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == served
    assert (spec.get("clusterIP") == "None") == (role != "gateway")


def test_all_pods_are_closed_but_to_each_other_and_dns() -> None:
    objects = render()
    policy = objects.get("NetworkPolicy")["spec"]
    assert policy["podSelector"] == {"matchLabels": OWN}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    for pod in objects.pods.values():
        assert OWN.items() <= pod["metadata"]["labels"].items()
    among = [{"podSelector": {"matchLabels": OWN}}]
    dns = {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
    assert policy["ingress"] == [{"from": among}]
    assert policy["egress"] == [{"to": among}, dns]


def test_downloads_open_one_port() -> None:
    rules = render({"networkPolicy": {"modelDownload": True}}).get("NetworkPolicy")["spec"]["egress"]
    assert rules[2]["ports"] == [{"protocol": "TCP", "port": 443}]


def test_more_can_be_opened() -> None:
    more = [{"to": [{"namespaceSelector": {}}], "ports": [{"protocol": "TCP", "port": 4317}]}]
    rules = render({"networkPolicy": {"egress": more}}).get("NetworkPolicy")["spec"]["egress"]
    assert rules[2:] == more


def test_clients_reach_gateways_and_nothing_else() -> None:
    peers: list[Manifest] = [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}]
    policy = render({"networkPolicy": {"clients": peers}}).get("NetworkPolicy", "clients")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": "demo", "ray.io/group": "gateway"}
    assert policy["ingress"] == [
        {"from": peers, "ports": [{"protocol": "TCP", "port": 50051}, {"protocol": "TCP", "port": 8000}]}
    ]
    # An empty list of peers would mean everybody: then there is no such policy, and nobody is let in.
    assert render({"networkPolicy": {"clients": []}}).names("NetworkPolicy") == {"demo"}
    assert render({"networkPolicy": {"enabled": False}}).names("NetworkPolicy") == set()


def test_budgets() -> None:
    objects = render({"decode": {"podDisruptionBudget": {"maxUnavailable": "25%"}}})
    allowed = {"head": 0, "prefill": 1, "decode": "25%", "gateway": 1}
    for name, count in allowed.items():
        spec = objects.get("PodDisruptionBudget", name)["spec"]
        group = "headgroup" if name == "head" else name
        assert spec["maxUnavailable"] == count
        assert spec["selector"]["matchLabels"] == {"ray.io/cluster": "demo", "ray.io/group": group}
    assert render({"podDisruptionBudgets": {"enabled": False}}).names("PodDisruptionBudget") == set()


def test_the_hubs_token() -> None:
    def references(values: Manifest) -> list[Manifest]:
        env = [entry for pod in render(values).pods.values() for entry in pod["spec"]["containers"][0]["env"]]
        return [entry["valueFrom"]["secretKeyRef"] for entry in env if entry["name"] == "HF_TOKEN"]

    assert references({}) == []
    assert references({"huggingFace": {"existingSecret": "s", "key": "k"}}) == [{"name": "s", "key": "k"}] * 4
    made: Manifest = {"huggingFace": {"token": "hf_x"}}
    assert references(made) == [{"name": "demo-hugging-face", "key": "token"}] * 4
    assert render(made).get("Secret", "hugging-face")["stringData"] == {"token": "hf_x"}
    assert render().names("Secret") == set()


def test_the_claim_for_models() -> None:
    claim = render({"modelCache": {"persistent": True, "size": "9Gi"}}).get("PersistentVolumeClaim", "models")
    assert claim["spec"] == {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "9Gi"}}}
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert render().names("PersistentVolumeClaim") == set()


def test_the_account_has_no_token() -> None:
    assert render().get("ServiceAccount")["automountServiceAccountToken"] is False
    for pod in render({"serviceAccount": {"create": False, "name": "mine"}}).pods.values():
        assert pod["spec"]["serviceAccountName"] == "mine"
