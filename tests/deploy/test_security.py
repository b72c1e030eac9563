"""TLS and API keys: which pods mount which Secret, what the configuration says of them, what probes and Services do."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from chart import Manifest, Objects, render

from branchline.config import from_mapping

OUTSIDE: Manifest = {"outside": {"enabled": True, "secret": "public"}}
INSIDE: Manifest = {"inside": {"enabled": True, "secret": "mesh"}}
KEYS: Manifest = {"apiKeys": {"secret": "keys"}}
WORKERS = ("prefill", "decode")


def secured(*parts: Manifest) -> Objects:
    return render({"security": {name: values for part in parts for name, values in part.items()}})


def mounted(objects: Objects) -> dict[str, dict[str, str]]:
    """The Secrets that each pod mounts as files: directory to name. Each is read-only."""
    found: dict[str, dict[str, str]] = {}
    for name, pod in objects.pods.items():
        volumes = {volume["name"]: volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume}
        (container,) = pod["spec"]["containers"]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"] if mount["name"] in volumes}
        assert set(mounts) == set(volumes)
        assert all(mount["readOnly"] for mount in mounts.values())
        assert all(volume["defaultMode"] == 0o440 for volume in volumes.values())
        found[name] = {mounts[key]["mountPath"]: volume["secretName"] for key, volume in volumes.items()}
    return found


def test_each_secret_goes_to_those_who_need_it_and_to_nobody_else() -> None:
    assert not any(mounted(render()).values())
    found = mounted(secured(OUTSIDE, INSIDE, KEYS))
    mesh = {"/etc/branchline/inside": "mesh"}
    assert found["prefill"] == found["decode"] == mesh
    assert found["gateway"] == mesh | {"/etc/branchline/outside": "public", "/etc/branchline/api-keys": "keys"}
    assert found["headgroup"] == found["launcher"] == {}


def test_the_configuration_names_the_mounted_files() -> None:
    def section(*parts: Manifest) -> Any:
        return yaml.safe_load(secured(*parts).config).get("security")

    assert section() is None
    outside = {"certificate": "/etc/branchline/outside/tls.crt", "key": "/etc/branchline/outside/tls.key"}
    assert section(OUTSIDE) == {"outside": outside}
    with_clients: Manifest = {"outside": {**OUTSIDE["outside"], "clientCa": True}}
    assert section(with_clients) == {"outside": outside | {"client_ca": "/etc/branchline/outside/ca.crt"}}
    files = {"certificate": "tls.crt", "key": "tls.key", "ca": "ca.crt"}
    inside = {name: f"/etc/branchline/inside/{file}" for name, file in files.items()}
    assert section(INSIDE) == {"inside": inside | {"server_name": "branchline"}}
    assert section(KEYS) == {"api_keys": "/etc/branchline/api-keys/keys.yaml"}


def test_the_program_reads_it() -> None:
    security = from_mapping(yaml.safe_load(secured(OUTSIDE, INSIDE, KEYS).config)).security
    assert security.outside.on
    assert security.inside.on
    assert security.api_keys


@pytest.mark.parametrize(("part", "roles"), [(OUTSIDE, ("gateway",)), (INSIDE, WORKERS)], ids=["outside", "inside"])
def test_the_kubelet_asks_no_grpc_where_there_is_tls(part: Manifest, roles: tuple[str, ...]) -> None:
    objects = secured(part)
    for role in (*WORKERS, "gateway"):
        (container,) = objects.pods[role]["spec"]["containers"]
        port = container["ports"][0]["containerPort"]
        expected = {"tcpSocket": {"port": port}} if role in roles else {"grpc": {"port": port}}
        for probe in ("startupProbe", "readinessProbe"):
            assert expected.items() <= container[probe].items()
        protocols = [port.get("appProtocol") for port in objects.get("Service", role)["spec"]["ports"]]
        if role == "gateway":
            assert protocols == ([None, "https"] if role in roles else ["kubernetes.io/h2c", "http"])
        else:
            assert protocols == [None if role in roles else "kubernetes.io/h2c"]


def test_cert_manager_writes_the_secrets_that_are_mounted() -> None:
    issuers: dict[str, Manifest] = {
        "outside": {"issuer": "public-ca", "kind": "ClusterIssuer", "dnsNames": ["llm.example.org"]},
        "inside": {"issuer": "own-ca"},
    }
    parts = {name: {"enabled": True, "secret": name, "certManager": issuer} for name, issuer in issuers.items()}
    objects = render({"security": parts})
    assert mounted(objects)["gateway"] == {f"/etc/branchline/{name}": name for name in issuers}
    outside, inside = (objects.get("Certificate", name)["spec"] for name in issuers)
    assert outside["secretName"] == "outside"
    assert outside["issuerRef"] == {"name": "public-ca", "kind": "ClusterIssuer"}
    assert (outside["dnsNames"], outside["usages"]) == (["llm.example.org"], ["server auth"])
    assert inside["secretName"] == "inside"
    assert inside["issuerRef"] == {"name": "own-ca", "kind": "Issuer"}
    assert (inside["dnsNames"], inside["usages"]) == (["branchline"], ["server auth", "client auth"])
    assert not secured(OUTSIDE, INSIDE).names("Certificate")
