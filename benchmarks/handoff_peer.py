"""The decode worker of the hand-off's benchmark: the real service, with a cache of a given shape, and a bare stream.

    python -m benchmarks.handoff_peer llama-3.1-8b 1200

Prints HOST:PORT and serves until it is ended. The model's weights are next to nothing; only its KV counts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import sys

import torch

from benchmarks.engine_shapes import SHAPES, RandomTensors
from benchmarks.handoff_bare import add_bare
from branchline.config import EngineConfig
from branchline.core import Fingerprint
from branchline.engine.decode import DecodeRunner
from branchline.engine.hosting import hosted_engine
from branchline.engine.models.protocol import Models
from branchline.engine.models.reference import build_target
from branchline.engine.models.reference_config import DecoderConfig
from branchline.engine.tree import TreeTopology
from branchline.engine.tree_spec import parse_tree
from branchline.v1 import decode_pb2_grpc
from branchline.wire.memory import keep_large_buffers
from branchline.wire.server import RpcServer
from decode_worker.engine_loop import DecodeLoop
from decode_worker.leases import LeaseTable
from decode_worker.service import PARSERS, SERVICE, DecodeService
from decode_worker.sessions import Sessions

#: Layers, KV heads and the size of a head, in bfloat16; the rest of a model is as small as it can be.
KV_SHAPES = {"smollm2-135m": (30, 3, 64), "llama-3.1-8b": (32, 8, 128), "tiny": (8, 2, 16)}
MAX_TOKENS = 8192


def kv_models(shape: str) -> Models:
    """A target whose KV has the shape and whose weights have nothing."""
    layers, heads, head_dim = KV_SHAPES[shape]
    decoder: DecoderConfig = dataclasses.replace(
        SHAPES["tiny"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_position=MAX_TOKENS + 64,
    )
    device = torch.device("cpu")
    target = build_target(decoder, RandomTensors(device, torch.bfloat16), (), device, torch.bfloat16, ())
    return Models(shape, target, None, Fingerprint({"shape": shape}), device, torch.bfloat16)


def engine_config(cache_mib: int) -> tuple[EngineConfig, TreeTopology]:
    return EngineConfig(kv_cache_mib=cache_mib, max_batch=2, threads=1), parse_tree("none")


async def serve(shape: str, cache_mib: int) -> None:
    def build() -> DecodeLoop:
        engine, tree = engine_config(cache_mib)
        models = kv_models(shape)
        runner = DecodeRunner(models, engine, tree)
        runner.caches.target.storage.fill_(0)  # pages that were touched before, as after a while of serving
        return DecodeLoop(models, tree, runner)

    async with hosted_engine("decode-engine", build, asyncio.Event()) as host:
        assert host is not None
        sessions = Sessions(host.thread, host.engine, LeaseTable(secrets.token_hex(8), 60.0))
        server = RpcServer("127.0.0.1", 0)
        server.add(SERVICE, DecodeService(sessions), decode_pb2_grpc.add_DecodeServiceServicer_to_server, PARSERS)
        server.add("benchmark.Bare", None, add_bare)
        print(await server.start(), flush=True)
        try:
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes it
        finally:
            sessions.close("the benchmark is over")
            await server.stop(0.0)


if __name__ == "__main__":
    keep_large_buffers()
    torch.set_num_threads(1)
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
