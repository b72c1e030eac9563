"""Connections to decode workers: for each address a channel per stream of a hand-off, kept between hand-offs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc

from branchline.wire.channels import open_channel
from branchline.wire.tls import ChannelTls
from branchline.wire.transfer import GrpcTransport

#: Seconds without a hand-off after which a channel is closed, at the next opportunity.
IDLE_S = 300.0


@dataclass
class _Connection:
    channels: tuple[grpc.aio.Channel, ...]
    transport: GrpcTransport
    users: int = 0
    last_used: float = 0.0

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()


class DecodeChannels:
    """Belongs to one event loop."""

    def __init__(self, streams: int, tls: ChannelTls | None = None) -> None:
        """`tls` None is plain text."""
        self._streams = streams
        self._tls = tls
        self._connections: dict[str, _Connection] = {}

    @contextlib.asynccontextmanager
    async def use(self, address: str) -> AsyncGenerator[GrpcTransport]:
        """The transport to HOST:PORT. Raises InvalidRequestError when it is no address."""
        await self._close_idle()
        connection = self._connections.get(address)
        if connection is None:
            shared = self._streams == 1
            channels = tuple(open_channel(address, shared=shared, tls=self._tls) for _ in range(self._streams))
            connection = _Connection(channels, GrpcTransport(channels))
            self._connections[address] = connection
        connection.users += 1
        try:
            yield connection.transport
        finally:
            connection.users -= 1
            connection.last_used = time.monotonic()

    async def close(self) -> None:
        """Ends what still uses the channels with CANCELLED."""
        connections = tuple(self._connections.values())
        self._connections.clear()
        for connection in connections:
            await connection.close()

    async def _close_idle(self) -> None:
        before = time.monotonic() - IDLE_S
        idle = [at for at, one in self._connections.items() if one.users == 0 and one.last_used < before]
        for connection in [self._connections.pop(address) for address in idle]:
            await connection.close()
