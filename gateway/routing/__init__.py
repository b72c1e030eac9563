"""To which workers a request goes: policies behind one small interface, chosen by `gateway.routing`."""

from __future__ import annotations

from branchline.config import GatewayConfig
from gateway.routing.load import LeastLoad, PowerOfTwo
from gateway.routing.policy import Policy
from gateway.routing.prefix import PrefixAffinity
from gateway.routing.session import SessionAffinity


def make_policy(config: GatewayConfig, block_size: int) -> Policy:
    """The configured one. `block_size`: tokens in a KV block, as the workers have them."""
    match config.routing:
        case "least_load":
            return LeastLoad()
        case "power_of_two":
            return PowerOfTwo()
        case "session_affinity":
            return SessionAffinity()
        case name:
            assert name == "prefix_affinity", name
            return PrefixAffinity(block_size, config.routing_blocks)
