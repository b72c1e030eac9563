"""Metrics in the chart: who is scraped and by whom, the alerts, the dashboard. (That what they ask for exists:
tests/cluster/test_deployed.py.)"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chart import ROOT, Manifest, render
from monitoring import PORT, PROMTOOL, VALUES, dashboard, named, panel_queries, promtool, rules, write

NODES = {"ray.io/cluster": "demo", "ray.io/node-type": "worker"}
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")


def test_every_role_serves_metrics_at_one_service_of_their_own() -> None:
    objects = render(VALUES)
    service = objects.get("Service", "metrics")["spec"]
    assert (service["clusterIP"], service["selector"]) == ("None", NODES)
    assert service["ports"] == [{"name": "metrics", "port": PORT, "targetPort": "metrics"}]
    for role in ("prefill", "decode", "gateway"):
        (container,) = objects.pods[role]["spec"]["containers"]
        assert {"name": "metrics", "containerPort": PORT} in container["ports"]
        assert f"metrics_port: {PORT}" in objects.config
    assert "metrics" not in {port["name"] for port in objects.get("Service", "gateway")["spec"]["ports"]}


def test_without_a_port_there_is_nothing_of_it() -> None:
    objects = render()
    assert "metrics" not in objects.config
    assert not any("metrics" in m["metadata"]["name"] for m in objects.manifests)


def test_the_monitor_selects_the_service_and_prometheus_may_come() -> None:
    objects = render(VALUES | {"monitoring": {"serviceMonitor": {"enabled": True, "labels": {"release": "prom"}}}})
    monitor = objects.get("ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prom"
    assert [endpoint.pop("relabelings")[0]["regex"] for endpoint in monitor["spec"]["endpoints"]] == [
        "gateway",
        "prefill|decode",
    ]
    assert monitor["spec"]["endpoints"] == [{"port": "metrics", "path": "/metrics", "interval": "15s"}] * 2
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    selected = [m for m in objects.manifests if m["kind"] == "Service" and wanted <= m["metadata"]["labels"].items()]
    assert selected == [objects.get("Service", "metrics")]
    policy = objects.get("NetworkPolicy", "metrics")["spec"]
    assert policy["podSelector"]["matchLabels"] == NODES
    assert policy["ingress"] == [
        {"from": VALUES["networkPolicy"]["scrapers"], "ports": [{"protocol": "TCP", "port": PORT}]}
    ]


def test_the_monitor_speaks_the_tls_of_each_role() -> None:
    security = {"outside": {"enabled": True, "secret": "public"}, "inside": {"enabled": True, "secret": "mesh"}}
    monitoring = {"serviceMonitor": {"enabled": True, "gatewayTls": {"serverName": "llm.example.org"}}}
    gateways, workers = render(VALUES | {"security": security, "monitoring": monitoring}).get("ServiceMonitor")["spec"][
        "endpoints"
    ]
    assert gateways["scheme"] == workers["scheme"] == "https"
    assert gateways["tlsConfig"] == {"serverName": "llm.example.org"}
    assert workers["tlsConfig"] == {
        "ca": {"secret": {"name": "mesh", "key": "ca.crt"}},
        "cert": {"secret": {"name": "mesh", "key": "tls.crt"}},
        "keySecret": {"name": "mesh", "key": "tls.key"},
        "serverName": "branchline",
    }


def test_alerts_are_about_this_release_and_documented() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for rule in rules():
        selectors = re.findall(r"branchline_\w+(\{[^}]*\})?", rule["expr"])
        assert selectors
        assert all('namespace="default", job="demo-metrics"' in selector for selector in selectors), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert f"`{rule['alert']}`" in guide
    slow = render(VALUES | {"monitoring": {"rules": {"enabled": True, "firstTokenSeconds": 2.5}}})
    assert any(rule["expr"].endswith("> 2.5") for rule in rules(slow))


def test_the_dashboard_has_no_panel_twice_and_none_overlaps() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert all(named(query) for query in panel_queries())


@needs_promtool
def test_promtool_finds_nothing_wrong(tmp_path: Path) -> None:
    queries = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(panel_queries())]
    file = write(tmp_path / "rules.yaml", {"groups": [{"name": "all", "rules": [*rules(), *queries]}]})
    assert f"{len(rules()) + len(queries)} rules found" in promtool("check", "rules", str(file))


#: For each alert series that set it off, as promtool writes them, and the minute by which they have.
FIRING: dict[str, tuple[int, dict[str, str]]] = {
    "BranchlineGone": (3, {}),
    "BranchlineNoWorkers": (2, {'gateway_workers{role="decode", model="default", state="up"': "0x40"}),
    "BranchlineWorkerDown": (6, {'gateway_workers{role="decode", model="default", state="down"': "1x40"}),
    "BranchlineRequestsFail": (
        20,
        {'gateway_requests_total{code="OK"': "0+90x40", 'gateway_requests_total{code="UNAVAILABLE"': "0+10x40"},
    ),
    "BranchlineFull": (11, {"gateway_requests_running{": "250x40", "gateway_requests_limit{": "256x40"}),
    "BranchlineSlowFirstToken": (
        20,
        {
            f'gateway_time_to_first_token_seconds_bucket{{le="{le}"': f"0+{step}x40"
            for le, step in (("10", 50), ("30", 100), ("+Inf", 100))
        },
    ),
    "BranchlineFailovers": (15, {"gateway_failovers_total{": "0+1x40"}),
    "BranchlineHandoffsFail": (
        20,
        {'prefill_handoffs_total{outcome="complete"': "0+90x40", 'prefill_handoffs_total{outcome="failed"': "0+10x40"},
    ),
    "BranchlinePreemptions": (30, {"decode_preemptions_total{": "0+12x40"}),
}
#: The same system on a good day: nothing of it sets anything off.
QUIET = {
    'build_info{role="gateway"': "1x40",
    'gateway_workers{role="decode", model="default", state="up"': "2x40",
    'gateway_workers{role="decode", model="default", state="down"': "0x40",
    'gateway_requests_total{code="OK"': "0+99x40",
    'gateway_requests_total{code="CANCELLED"': "0+50x40",
    'gateway_requests_total{code="UNAVAILABLE"': "0+1x40",
    "gateway_requests_running{": "100x40",
    "gateway_requests_limit{": "256x40",
    'gateway_time_to_first_token_seconds_bucket{le="10"': "0+100x40",
    'gateway_time_to_first_token_seconds_bucket{le="+Inf"': "0+100x40",
    "gateway_failovers_total{": "0+1x3 3x36",
    'prefill_handoffs_total{outcome="complete"': "0+99x40",
    'prefill_handoffs_total{outcome="failed"': "0+1x40",
    "decode_preemptions_total{": "0+1x40",
}


def _series(values: dict[str, str]) -> list[dict[str, str]]:
    made = []
    for start, numbers in values.items():
        start += "" if start.endswith("{") else ", "
        made.append({"series": f'branchline_{start}namespace="default", job="demo-metrics"}}', "values": numbers})
    return made


@needs_promtool
def test_each_alert_fires_for_its_own_cause_and_none_on_a_good_day(tmp_path: Path) -> None:
    alerts = {rule["alert"]: rule for rule in rules()}
    assert set(FIRING) == set(alerts)
    write(tmp_path / "rules.yaml", {"groups": [{"name": "branchline", "rules": rules()}]})
    cases: list[Manifest] = [
        {
            "interval": "1m",
            "input_series": _series(QUIET),
            "alert_rule_test": [{"eval_time": "35m", "alertname": name, "exp_alerts": []} for name in alerts],
        }
    ]
    write(tmp_path / "quiet.yaml", {"rule_files": ["rules.yaml"], "tests": cases})
    promtool("test", "rules", str(tmp_path / "quiet.yaml"))
    for name, (minute, values) in FIRING.items():
        case: dict[str, Any] = {"interval": "1m", "input_series": _series(values)}
        case["alert_rule_test"] = [{"eval_time": f"{minute}m", "alertname": name, "exp_alerts": []}]
        file = write(tmp_path / f"{name}.yaml", {"rule_files": ["rules.yaml"], "tests": [case]})
        # It says what it has got in place of nothing: the labels and texts are there to be read.
        with pytest.raises(AssertionError, match=rf'alertname="{name}"') as told:
            promtool("test", "rules", str(file))
        assert alerts[name]["labels"]["severity"] in str(told.value)
