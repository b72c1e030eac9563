"""What `branchline status` shows: a table for people, an object for programs."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from branchline.v1 import control_pb2


def as_json(cluster: control_pb2.GetClusterResponse) -> dict[str, Any]:
    """The response's own fields; `workers` are all processes, gateways too."""
    whole: dict[str, Any] = json_format.MessageToDict(
        cluster, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {**{name: value for name, value in whole.items() if name != "processes"}, "workers": whole["processes"]}


def as_table(cluster: control_pb2.GetClusterResponse) -> str:
    update = [f"update {cluster.update.state}: {cluster.update.detail}"] if cluster.HasField("update") else []
    head = f"Branchline {cluster.version}, model {cluster.model}, {cluster.state}, up {_duration(cluster.uptime_s)}"
    rows: list[tuple[str, ...]] = [
        ("ID", "STATE", "NODE", "ADDRESS", "RUNNING", "QUEUED", "BLOCKS", "TOKENS/S", "ACCEPTED", "")
    ]
    rows += [_row(process) for process in cluster.processes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *update, *lines])


def _row(process: control_pb2.ClusterProcess) -> tuple[str, ...]:
    restarts = f"{process.restarts} restart{'s' if process.restarts > 1 else ''}" if process.restarts else ""
    notes = [
        f"for {process.model}" if process.model else "",
        process.detail,
        restarts,
        f"http {process.http_address}" if process.http_address else "",
    ]
    return (
        process.id,
        process.state,
        process.node or "-",
        process.address or "-",
        str(process.running),
        str(process.queued),
        f"{process.blocks_used}/{process.blocks_total}" if process.blocks_total else "-",
        f"{process.tokens_per_s:.0f}",
        f"{process.acceptance_length:.2f}" if process.acceptance_length else "-",
        ", ".join(filter(None, notes)),
    )


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.0f} h"
