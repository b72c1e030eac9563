"""A TCP proxy between two workers on which bytes are late, lost, or not what was sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass
class TcpProxy:
    """`fault` befalls what goes to the target once `after` bytes of a connection have passed; the first `times`
    connections meet with it.

    "delay": every piece comes 20 ms late; "stall": nothing passes any more, in either direction, and nobody is told;
    "reset": the connection is reset; "truncate": it ends as if all were well; "corrupt": one bit is flipped.
    """

    target: str
    fault: str
    after: int
    times: int = 1
    bit: int = 0
    connections: int = 0
    faults: int = 0
    _handlers: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.connections = self.connections, self.connections + 1
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        host, _, port = self.target.rpartition(":")
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        road = _Road(self, number < self.times)
        pumps = [
            asyncio.create_task(road.onwards(reader, there_writer)),
            asyncio.create_task(road.back(there_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            for end in (writer, there_writer):
                if road.over and self.fault == "reset":
                    end.transport.abort()
                end.close()
            self._handlers.discard(task)

    async def close(self) -> None:
        for task in tuple(self._handlers):
            task.cancel()
        if self._handlers:
            await asyncio.wait(tuple(self._handlers))


@dataclass
class _Road:
    proxy: TcpProxy
    bad: bool
    passed: int = 0
    stalled: bool = False
    #: Nothing more is to pass: the connection ends, by a reset or as if all were well.
    over: bool = False

    async def onwards(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                data = await self._through(data)
                writer.write(data)
                await writer.drain()
                if self.over:
                    return

    async def back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096):
                if not self.stalled:
                    writer.write(data)
                    await writer.drain()

    async def _through(self, data: bytes) -> bytes:
        proxy, start = self.proxy, self.passed
        self.passed += len(data)
        if not self.bad or self.passed <= proxy.after:
            return data
        proxy.faults += 1
        keep = max(0, proxy.after - start)
        match proxy.fault:
            case "delay":
                await asyncio.sleep(0.02)
            case "stall":
                self.stalled = True
                await asyncio.Event().wait()
            case "reset" | "truncate":
                self.over = True
                return data[:keep]
            case "corrupt":
                self.bad = False
                return data[:keep] + bytes([data[keep] ^ 1 << proxy.bit]) + data[keep + 1 :]
        return data


@contextlib.asynccontextmanager
async def tcp_proxy(target: str, fault: str, after: int, **options: int) -> AsyncIterator[tuple[str, TcpProxy]]:
    """The proxy's address, to be used in place of `target`, and the proxy."""
    proxy = TcpProxy(target, fault, after, **options)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy
    finally:
        server.close()
        await proxy.close()
