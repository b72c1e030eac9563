"""The flags of `branchline serve`, `branchline explain` and `cluster.launch`, and the configuration they make."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from branchline.config import DTYPES, PROVIDERS, ROUTINGS, Config, load

#: A flag's name in the parsed arguments -> the field of the configuration that it sets.
_FIELDS = {
    "model": "model.model",
    "draft": "model.draft",
    "dtype": "model.dtype",
    "compile": "engine.compile",
    "prefix_caching": "engine.prefix_caching",
    "tree": "model.tree",
    "provider": "model.provider",
    "prefill": "prefill.replicas",
    "decode": "decode.replicas",
    "gateways": "gateway.replicas",
    "host": "gateway.host",
    "grpc_port": "gateway.grpc_port",
    "http_port": "gateway.http_port",
    "served_model_name": "gateway.served_model_name",
    "routing": "gateway.routing",
    "tool_parser": "gateway.tool_parser",
    "reasoning_parser": "gateway.reasoning_parser",
    "ray_address": "ray.address",
    "detach": "ray.detached",
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What is loaded. Every flag overrides its field of the file given by --config."""
    add = parser.add_argument
    add("--config", metavar="FILE", help="a YAML file with any field of branchline/config.py")
    add("--model", metavar="M", help="a directory, a Hugging Face id, or 'default'")
    add("--draft", metavar="D", help="an EAGLE-3 head: a directory, a Hugging Face id, 'default' or 'none'")
    add("--dtype", choices=DTYPES)
    add(
        "--tree",
        metavar="T",
        help="none, chain:K, best:N (the head's own), static:FILE, dynamic:DEPTH,TOPK,NODES, or choices such as "
        "'[[0],[1],[0,0]]'",
    )
    add("--provider", choices=PROVIDERS)
    add(
        "--compile",
        action="store_true",
        default=None,
        help="compile the model: faster steps, a slower start; needs a C++ compiler",
    )


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """What is loaded, and a system that serves it."""
    add_model_flags(parser)
    add = parser.add_argument
    add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the KV of prompts for later ones that begin alike (default: yes)",
    )
    add("--prefill", type=int, metavar="N", help="number of prefill workers")
    add("--decode", type=int, metavar="N", help="number of decode workers")
    add("--gateways", type=int, metavar="N", help="number of gateways")
    add("--host", metavar="H", help="where gateways listen; 0.0.0.0 for all interfaces")
    add("--grpc-port", type=int, metavar="P", help="the first gateway's port, 0 for a free one; the next count up")
    add(
        "--http-port", type=int, metavar="P", help="also serve OpenAI's HTTP API there; 0 for a free port (default: no)"
    )
    add("--served-model-name", metavar="NAME", help="the model's name over HTTP")
    add("--routing", choices=ROUTINGS, help="how gateways choose workers (default: prefix_affinity)")
    add("--tool-parser", metavar="NAME", help="vLLM's parser that finds tool calls in a chat's text, such as hermes")
    add("--reasoning-parser", metavar="NAME", help="vLLM's parser that tells reasoning from content, such as qwen3")
    add(
        "--ray-address",
        metavar="A",
        help="join a running Ray: 'auto' or HOST:PORT; 'local' starts one (default: $RAY_ADDRESS, or start one)",
    )
    add(
        "--detach",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="on a running Ray: end when requests can be answered, and leave the system there (default: no)",
    )
    add("--verbose", action="store_true", help="also show what the workers log")


def config_from(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Raises ConfigError for a bad file, an unknown field or a wrong value."""
    config = load(arguments.config) if arguments.config else Config()
    config = config.override(**{field: getattr(arguments, flag, None) for flag, field in _FIELDS.items()})
    if not config.ray.address:
        config = config.override(**{"ray.address": environ.get("RAY_ADDRESS")})
    return config
