"""The launcher: what it submits, where, with which token; when it is replaced."""

from __future__ import annotations

from chart import Manifest, render

from cluster import submit


def container(values: Manifest | None = None) -> Manifest:
    (found,) = render(values).pods["launcher"]["spec"]["containers"]
    launcher: Manifest = found
    return launcher


def environment(values: Manifest | None = None) -> dict[str, Manifest]:
    return {entry["name"]: entry for entry in container(values)["env"]}


def test_it_submits_the_mounted_configuration_to_the_clusters_head() -> None:
    launcher = container()
    assert launcher["command"] == ["python", "-m", "cluster.submit"]
    flags = dict(argument.removeprefix("--").split("=") for argument in launcher["args"])
    assert flags == {
        "config": "/etc/branchline/config.yaml",
        "address": "http://demo-head-svc:8265",
        "name": "demo",
    }
    (mount,) = [mount for mount in launcher["volumeMounts"] if mount["name"] == "config"]
    assert mount == {"name": "config", "mountPath": "/etc/branchline", "readOnly": True}
    objects = render()
    (volume,) = [v for v in objects.pods["launcher"]["spec"]["volumes"] if v["name"] == "config"]
    assert volume["configMap"]["name"] in objects.names("ConfigMap")


def test_it_is_replaced_when_the_configuration_changes_and_only_then() -> None:
    before = render().get("Deployment", "launcher")["spec"]["template"]
    assert (
        render({"config": {"model": {"tree": "chain:3"}}}).get("Deployment", "launcher")["spec"]["template"] != before
    )
    assert render({"decode": {"replicas": 2}}).get("Deployment", "launcher")["spec"]["template"] != before
    assert render({"decode": {"nodeSelector": {"a": "b"}}}).get("Deployment", "launcher")["spec"]["template"] == before


def test_one_at_a_time_with_time_to_stop_its_job() -> None:
    spec = render().get("Deployment", "launcher")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > submit.STOP_TIMEOUT_S
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_it_has_rays_token() -> None:
    env = environment()
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "demo", "key": "auth_token"}
    own = environment({"rayAuth": {"existingSecret": "mine"}})
    assert own["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "mine"
    assert "RAY_AUTH_MODE" not in environment({"rayAuth": {"enabled": False}})
