"""Bind, serve with health and reflection, stop."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from wire_servicers import ScriptedGateway

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2, gateway_pb2_grpc
from branchline.wire.channels import open_channel
from branchline.wire.server import BindError, PortInUseError, RpcServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_answers_for_every_service(channel: grpc.aio.Channel, server: RpcServer) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "branchline.v1.GatewayService", "branchline.v1.DecodeService"):
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status == SERVING
    await server.set_serving(False)
    assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="branchline.v1.Unknown"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_and_describes_the_services(channel: grpc.aio.Channel) -> None:
    async def ask(request: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=5)
        return await call.read()

    listed = await ask(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in listed.list_services_response.service}
    assert {"branchline.v1.GatewayService", "branchline.v1.DecodeService", "grpc.health.v1.Health"} <= names
    described = await ask(reflection_pb2.ServerReflectionRequest(file_containing_symbol="branchline.v1.GatewayService"))
    assert described.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
async def test_a_busy_port_is_an_error(address: str, host: str) -> None:
    port = int(address.rpartition(":")[2])
    with pytest.raises(PortInUseError, match=f"port {port} on {host} is in use"):
        await RpcServer(host, port).start()


async def test_a_port_held_by_another_program_is_an_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PortInUseError):
            await RpcServer("127.0.0.1", other.getsockname()[1]).start()


async def test_a_wrong_host_is_an_error() -> None:
    with pytest.raises(BindError, match=r"cannot listen on 192\.0\.2\.1:"):
        await RpcServer("192.0.2.1", 0).start()
    with pytest.raises(BindError, match=r"cannot listen on no\.such\.host\.invalid:0"):
        await RpcServer("no.such.host.invalid", 0).start()


async def test_a_port_is_free_again_after_the_stop(server: RpcServer, address: str) -> None:
    await server.stop(grace_s=1)
    again = RpcServer("127.0.0.1", int(address.rpartition(":")[2]))
    assert await again.start() == address
    await again.stop(grace_s=1)


async def test_services_come_before_the_start(server: RpcServer, gateway: ScriptedGateway) -> None:
    await server.start()
    with pytest.raises(RuntimeError, match="before start"):
        server.add("late", gateway, gateway_pb2_grpc.add_GatewayServiceServicer_to_server)
    with pytest.raises(RuntimeError, match="once"):
        await server.start()


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "host:http", "host:²"])
def test_a_channel_needs_host_and_port(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="HOST:PORT"):
        open_channel(address)


class TestStop:
    async def test_waits_for_calls_that_end_by_themselves(
        self, server: RpcServer, channel: grpc.aio.Channel, gateway: ScriptedGateway
    ) -> None:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(gateway_pb2.GenerateRequest(prompt="fine"), timeout=10)
        await call.read()
        started = time.monotonic()
        await server.stop(grace_s=10)
        assert time.monotonic() - started < 5  # the grace is an upper limit
        assert gateway.closed.is_set()
        assert not gateway.cancelled.is_set()
        assert await call.code() is grpc.StatusCode.OK

    async def test_cancels_the_others_after_the_grace(
        self, server: RpcServer, channel: grpc.aio.Channel, gateway: ScriptedGateway
    ) -> None:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(gateway_pb2.GenerateRequest(prompt="wait"), timeout=30)
        await call.read()
        await server.stop(grace_s=0.2)
        assert gateway.cancelled.is_set()
        assert gateway.closed.is_set()  # its cleanup has run, too
        assert server.running_calls == 0
        assert await call.code() is not grpc.StatusCode.OK

    async def test_does_not_wait_for_health_watchers(self, server: RpcServer, channel: grpc.aio.Channel) -> None:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert (await watch.read()).status == SERVING
        started = time.monotonic()
        await server.stop(grace_s=10)
        assert time.monotonic() - started < 5

    async def test_is_idempotent_and_legal_before_the_start(self, server: RpcServer) -> None:
        await server.stop(grace_s=1)
        await server.start()
        await asyncio.gather(server.stop(grace_s=1), server.stop(grace_s=1))
        await server.stop(grace_s=1)

    async def test_refuses_new_calls_meanwhile(
        self, server: RpcServer, channel: grpc.aio.Channel, gateway: ScriptedGateway
    ) -> None:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        running = stub.Generate(gateway_pb2.GenerateRequest(prompt="wait"), timeout=30)
        await running.read()
        stopping = asyncio.create_task(server.stop(grace_s=10))
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(gateway_pb2.GenerateRequest(prompt="fine"), timeout=5).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == NOT_SERVING
        running.cancel()
        await stopping
        assert gateway.closed.is_set()


async def test_calls_are_bounded() -> None:
    """Health watches too, which cost a client nothing; what ends makes room."""
    server = RpcServer("127.0.0.1", 0, max_calls=3)
    add = gateway_pb2_grpc.add_GatewayServiceServicer_to_server
    server.add("branchline.v1.GatewayService", ScriptedGateway(), add)
    address = await server.start()
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        assert [(await watch.read()).status for watch in watches] == [SERVING] * 3
        for method, request in (
            (stub.Check, health_pb2.HealthCheckRequest()),
            (gateway_pb2_grpc.GatewayServiceStub(channel).GetInfo, gateway_pb2.GetInfoRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(request, timeout=5)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        watches[0].cancel()
        async with asyncio.timeout(5):
            while True:
                try:
                    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.02)
    await server.stop(grace_s=0)
