"""A transport in memory: streams to a real receiver without sockets, on which messages meet with accidents.

Faults are drawn from a seeded generator, message by message, so a failing hand-off can be played again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import DecodeError

from branchline.core import InvalidRequestError
from branchline.v1 import decode_pb2
from branchline.wire.kv_codec import Incoming, KvMessage, Outgoing, parse_request, request_bytes
from branchline.wire.status import RpcFailure, failure_for
from branchline.wire.transfer import Stream, StreamError

Receive = Callable[[AsyncIterator[Incoming]], AsyncGenerator[decode_pb2.HandoffResponse]]

#: Messages that a stream holds on their way, in each direction.
CAPACITY = 4


@dataclass(frozen=True)
class Faults:
    """Probabilities, for each message; `lost` and `doubled` befall frames alone."""

    #: A flipped bit anywhere, and in the KV alone.
    damaged: float = 0.0
    data: float = 0.0
    lost: float = 0.0
    doubled: float = 0.0
    delayed: float = 0.0
    broken: float = 0.0
    #: From here on the stream swallows everything.
    stalled: float = 0.0
    delay_s: float = 0.005


@dataclass
class FakeTransport:
    """`receive` is the decode worker's side."""

    receive: Receive
    streams: int = 1
    faults: Faults = Faults()
    random: random.Random = field(default_factory=random.Random)
    opened: int = 0
    #: Streams whose receiving side has not ended.
    live: set[asyncio.Task[None]] = field(default_factory=set)

    def open(self, number: int, metadata: object = ()) -> Stream:  # noqa: ARG002
        assert 0 <= number < self.streams
        self.opened += 1
        return _FakeStream(self)

    async def settle(self) -> None:
        """Returns when the receiving sides of all streams have ended."""
        while self.live:
            await asyncio.wait(self.live)


class _FakeStream:
    def __init__(self, transport: FakeTransport) -> None:
        self._transport = transport
        self._requests: asyncio.Queue[Incoming | None] = asyncio.Queue(CAPACITY)
        self._responses: asyncio.Queue[decode_pb2.HandoffResponse] = asyncio.Queue(CAPACITY)
        self._ended: asyncio.Future[StreamError] = asyncio.get_running_loop().create_future()
        self._stalled = False
        self._serving = asyncio.create_task(self._serve())
        transport.live.add(self._serving)
        self._serving.add_done_callback(transport.live.discard)

    async def send(self, message: Outgoing) -> None:
        kv = isinstance(message, KvMessage)
        frame = kv or message.WhichOneof("part") == "draft"
        for _ in range(await self._copies(frame)):
            data = self._spoilt(request_bytes(message), message.kv_bytes if kv else 0)
            try:
                request = parse_request(data)
            except DecodeError:
                request = None
            await self._unless_ended(self._requests.put(request))

    async def receive(self) -> decode_pb2.HandoffResponse:
        response = await self._unless_ended(self._responses.get())
        await self._copies(False)
        while self._stalled:
            await self._unless_ended(asyncio.Event().wait())
        try:
            return decode_pb2.HandoffResponse.FromString(self._spoilt(response.SerializeToString()))
        except DecodeError:
            raise StreamError(grpc.StatusCode.DATA_LOSS, "a response came damaged") from None

    def close(self) -> None:
        self._serving.cancel()

    async def _copies(self, frame: bool) -> int:
        """What befalls a message: how often it arrives, and when."""
        faults, chance = self._transport.faults, self._transport.random.random
        if chance() < faults.delayed:
            await asyncio.sleep(faults.delay_s * chance())
        if chance() < faults.broken:
            self._serving.cancel()
        self._stalled = self._stalled or chance() < faults.stalled
        if self._stalled or (frame and chance() < faults.lost):
            return 0
        return 2 if frame and chance() < faults.doubled else 1

    def _spoilt(self, message: bytes, kv_bytes: int = 0) -> bytes:
        """A copy, damaged or not; the KV is at the end."""
        faults, generator = self._transport.faults, self._transport.random
        data = bytearray(message)
        if kv_bytes and generator.random() < faults.data:
            data[-1 - generator.randrange(kv_bytes)] ^= 1
        if generator.random() < faults.damaged:
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        return bytes(data)

    async def _unless_ended(self, coroutine):
        """The coroutine's result. Raises what the stream ended with as soon as it has, when nothing else is left."""
        task = asyncio.ensure_future(coroutine)
        try:
            await asyncio.wait({task, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._ended.result()
        finally:
            task.cancel()

    async def _incoming(self) -> AsyncIterator[Incoming]:
        while True:
            request = await self._requests.get()
            if request is None:
                raise InvalidRequestError("not a valid message")
            yield request

    async def _serve(self) -> None:
        ending = StreamError(grpc.StatusCode.UNAVAILABLE, "the stream ended before the hand-off")
        try:
            async with contextlib.aclosing(self._transport.receive(self._incoming())) as responses:
                async for response in responses:
                    await self._responses.put(response)
        except (RpcFailure, InvalidRequestError) as error:
            failure = failure_for(error)
            ending = StreamError(failure.code, failure.details)
        except asyncio.CancelledError:
            ending = StreamError(grpc.StatusCode.UNAVAILABLE, "the road is broken")
        finally:
            self._ended.set_result(ending)
