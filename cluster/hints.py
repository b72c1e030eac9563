"""What a user needs to be told about what keeps processes from starting, or from being reached."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from cluster.member import Member
from cluster.placement import needed_resources

LOOPBACK_PREFIXES = ("127.", "localhost:", "[::1]:")


def resources(members: Sequence[Member]) -> str:
    """What all claim, and what the cluster has."""
    free, total = ray.available_resources(), ray.cluster_resources()
    claims = needed_resources([member.seat for member in members]).items()
    have = ", ".join(
        f"{count:g} {kind} ({free.get(kind, 0):g} of {total.get(kind, 0):g} are free)" for kind, count in claims
    )
    return f"the system claims in all {have}"


def unreachable(member: Member, members: Sequence[Member]) -> str:
    """A worker on the loopback interface cannot be reached from another node; empty where all is well."""
    nodes = {other.info.node_ip for other in members if other.info}
    assert member.info
    known = member.address.rpartition(":")[0] == member.info.node_ip  # what other nodes call this one by
    if len(nodes) > 1 and member.role != "gateway" and member.address.startswith(LOOPBACK_PREFIXES) and not known:
        return f"{member.role}.host: {member.address} cannot be reached from the other nodes; use 0.0.0.0"
    return ""
