"""A peer in a process of its own, so that a test can freeze it: `wire_peer.py server`, `wire_peer.py client HOST:PORT`.

Prints its address, or "streaming", and then stays.
"""

from __future__ import annotations

import asyncio
import sys

from wire_servicers import ScriptedGateway

from branchline.v1 import gateway_pb2, gateway_pb2_grpc
from branchline.wire.channels import open_channel
from branchline.wire.server import RpcServer


async def serve() -> None:
    server = RpcServer("127.0.0.1", 0)
    server.add("branchline.v1.GatewayService", ScriptedGateway(), gateway_pb2_grpc.add_GatewayServiceServicer_to_server)
    print(await server.start(), flush=True)
    await asyncio.sleep(120)


async def call(address: str) -> None:
    async with open_channel(address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        stream = stub.Generate(gateway_pb2.GenerateRequest(prompt="wait"), timeout=120)
        await stream.read()
        print("streaming", flush=True)
        await stream.read()


if __name__ == "__main__":
    asyncio.run(serve() if sys.argv[1] == "server" else call(sys.argv[2]))
