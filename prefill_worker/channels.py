"""Connections to decode workers: one channel for each address, kept between hand-offs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import grpc

from branchline.v1 import decode_pb2_grpc
from branchline.wire.channels import open_channel

#: Seconds without a hand-off after which a channel is closed, at the next opportunity.
IDLE_S = 300.0


@dataclass
class _Connection:
    channel: grpc.aio.Channel
    stub: Any  # generated stubs carry no types
    users: int = 0
    last_used: float = 0.0


class DecodeChannels:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._connections: dict[str, _Connection] = {}

    @contextlib.asynccontextmanager
    async def use(self, address: str) -> AsyncGenerator[Any]:
        """A DecodeService stub for HOST:PORT. Raises InvalidRequestError when it is no address."""
        await self._close_idle()
        connection = self._connections.get(address)
        if connection is None:
            channel = open_channel(address)
            connection = _Connection(channel, decode_pb2_grpc.DecodeServiceStub(channel))
            self._connections[address] = connection
        connection.users += 1
        try:
            yield connection.stub
        finally:
            connection.users -= 1
            connection.last_used = time.monotonic()

    async def close(self) -> None:
        """Ends what still uses the channels with CANCELLED."""
        connections = tuple(self._connections.values())
        self._connections.clear()
        for connection in connections:
            await connection.channel.close()

    async def _close_idle(self) -> None:
        before = time.monotonic() - IDLE_S
        idle = [at for at, one in self._connections.items() if one.users == 0 and one.last_used < before]
        for connection in [self._connections.pop(address) for address in idle]:
            await connection.channel.close()
