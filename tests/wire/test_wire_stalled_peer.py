"""A frozen peer keeps its sockets open and answers nothing: only keepalive pings tell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from wire_servicers import ScriptedGateway

from branchline.v1 import gateway_pb2, gateway_pb2_grpc
from branchline.wire.channels import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS, open_channel
from branchline.wire.server import RpcServer

pytestmark = pytest.mark.wire

ROOT = Path(__file__).resolve().parents[2]
#: What the options promise, and as much again for a busy machine.
NOTICED_WITHIN_S = 2 * (KEEPALIVE_TIME_MS + KEEPALIVE_TIMEOUT_MS) / 1000


@contextlib.asynccontextmanager
async def peer(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and the first line that it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("wire_peer.py")),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        yield process, line.decode().strip()
    finally:
        process.kill()
        await process.wait()


async def test_a_frozen_server_is_noticed() -> None:
    async with peer("server") as (process, address), open_channel(address) as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(gateway_pb2.GenerateRequest(prompt="wait"), timeout=100)
        await call.read()
        process.send_signal(signal.SIGSTOP)
        frozen = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - frozen < NOTICED_WITHIN_S


async def test_a_frozen_client_is_noticed(address: str, gateway: ScriptedGateway, server: RpcServer) -> None:
    async with peer("client", address) as (process, line):
        assert line == "streaming"
        process.send_signal(signal.SIGSTOP)
        await asyncio.wait_for(gateway.closed.wait(), NOTICED_WITHIN_S)
        async with asyncio.timeout(5):
            while server.running_calls:
                await asyncio.sleep(0.01)


async def test_an_idle_channel_stays_welcome(channel: grpc.aio.Channel) -> None:
    """Our pings on an idle channel must not count as abuse: gRPC's default answers them with `too_many_pings`."""
    stub = gateway_pb2_grpc.GatewayServiceStub(channel)
    call = stub.Generate(gateway_pb2.GenerateRequest(prompt="wait"), timeout=100)
    await call.read()
    await asyncio.sleep(4 * KEEPALIVE_TIME_MS / 1000)
    assert channel.get_state() is grpc.ChannelConnectivity.READY
    assert not call.done()
    call.cancel()
