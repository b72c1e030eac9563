"""A real server on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from wire_servicers import ScriptedDecode, ScriptedGateway

from branchline.v1 import decode_pb2_grpc, gateway_pb2_grpc
from branchline.wire.channels import open_channel
from branchline.wire.server import RpcServer


@pytest.fixture
def gateway() -> ScriptedGateway:
    return ScriptedGateway()


@pytest.fixture
async def server(gateway: ScriptedGateway) -> AsyncIterator[RpcServer]:
    server = RpcServer("127.0.0.1", 0)
    server.add("branchline.v1.GatewayService", gateway, gateway_pb2_grpc.add_GatewayServiceServicer_to_server)
    server.add("branchline.v1.DecodeService", ScriptedDecode(), decode_pb2_grpc.add_DecodeServiceServicer_to_server)
    yield server
    await server.stop(grace_s=0)
    assert server.running_calls == 0


@pytest.fixture
async def address(server: RpcServer) -> str:
    return await server.start()


@pytest.fixture
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(address) as channel:
        yield channel
