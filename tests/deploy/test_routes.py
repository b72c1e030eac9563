"""Ways in from outside the cluster: GRPCRoute, HTTPRoute, Ingresses."""

from __future__ import annotations

import pytest
from chart import Manifest, render


def test_the_grpc_route() -> None:
    refs = [{"name": "public", "namespace": "edge", "sectionName": "https"}]
    values: Manifest = {"grpc": {"enabled": True, "parentRefs": refs, "hostnames": ["llm.example.org"]}}
    route = render({"routes": values, "ports": {"gateway": 6003}}).get("GRPCRoute", "grpc")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"] == {
        "parentRefs": refs,
        "hostnames": ["llm.example.org"],
        "rules": [{"backendRefs": [{"name": "demo-gateway", "port": 6003}]}],
    }


def test_the_http_route_has_time_for_long_answers() -> None:
    values: Manifest = {"http": {"enabled": True, "parentRefs": [{"name": "public"}], "timeout": "20m"}}
    route = render({"routes": values, "ports": {"http": 6004}}).get("HTTPRoute", "http")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"] == {
        "parentRefs": [{"name": "public"}],
        "rules": [{"backendRefs": [{"name": "demo-gateway", "port": 6004}], "timeouts": {"request": "20m"}}],
    }


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_an_ingress_leads_to_the_port_of_its_name(kind: str) -> None:
    values: Manifest = {"enabled": True, "host": "llm.example.org", "className": "c", "tlsSecret": "s"}
    objects = render({"ingress": {kind: values | {"annotations": {"a": "b"}}}})
    ingress = objects.get("Ingress", kind)
    backend = {"service": {"name": "demo-gateway", "port": {"name": kind}}}
    assert ingress["metadata"]["annotations"] == {"a": "b"}
    assert ingress["spec"] == {
        "ingressClassName": "c",
        "tls": [{"hosts": ["llm.example.org"], "secretName": "s"}],
        "rules": [
            {
                "host": "llm.example.org",
                "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]},
            }
        ],
    }
    assert kind in {port["name"] for port in objects.get("Service", "gateway")["spec"]["ports"]}
    plain = render({"ingress": {kind: {"enabled": True, "host": "llm.example.org"}}}).get("Ingress", kind)["spec"]
    assert set(plain) == {"rules"}


def test_there_is_none_by_default() -> None:
    assert not {m["kind"] for m in render().manifests} & {"GRPCRoute", "HTTPRoute", "Ingress"}
