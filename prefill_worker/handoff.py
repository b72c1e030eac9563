"""The sending side of a hand-off: frames to the decode worker over one stream or several, resumed when one breaks.

One task fills the outbox as the engine computes; each stream has a task that takes from it whatever comes next, so
the frames go where there is room, and one that reads the answers. A second stream opens when frames wait for the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence

import grpc

from branchline.observe.logs import about
from branchline.v1 import decode_pb2
from branchline.wire.kv_codec import Outgoing
from branchline.wire.seals import intact, seal
from branchline.wire.status import RpcFailure
from branchline.wire.transfer import Stream, StreamError, Transport
from prefill_worker.outbox import HandoffTotals, Outbox

#: Silence after which the header is sent again, so that the lease lives through a slow chunk.
HEARTBEAT_S = 1.0
#: Pauses before a broken stream is opened again; after as many attempts without progress the stream is given up.
RESUME_AFTER_S = (0.05, 0.2, 0.5)
#: Frames waiting that are worth another stream: its first message takes a round trip.
BACKLOG = 2

#: INTERNAL: what gRPC says of a write that met the end of its call, in place of the status that ended it, and of damage
#: that it noticed itself. RESOURCE_EXHAUSTED: what it says of a message whose length came damaged. The next stream gets
#: the real reason.
_RESUMABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)

#: What an answer of the decode worker means to the gateway, where it isn't what the code says to us.
_MEANING = {
    grpc.StatusCode.NOT_FOUND: grpc.StatusCode.ABORTED,  # it has restarted since it gave the lease
    grpc.StatusCode.DATA_LOSS: grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED: grpc.StatusCode.UNAVAILABLE,  # it is stopping
    grpc.StatusCode.DEADLINE_EXCEEDED: grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INVALID_ARGUMENT: grpc.StatusCode.INTERNAL,  # our frames are wrong, not the client's request
}

logger = logging.getLogger(__name__)


class HandoffSender:
    """Ships one request's hand-off to the lease that `header` names.

    `stall_s`: how long the decode worker may take to answer or to take a message; `metadata` goes with each stream.
    `request_id` is for the log.
    """

    def __init__(
        self,
        transport: Transport,
        address: str,
        header: decode_pb2.HandoffHeader,
        messages: AsyncGenerator[Outgoing],
        stall_s: float,
        metadata: Sequence[tuple[str, str]] = (),
        request_id: str = "",
    ) -> None:
        self._request_id = request_id
        #: Times that a stream was opened again because one had broken.
        self.retries = 0
        self._metadata = metadata
        self._transport = transport
        self._address = address
        self._header = header
        self._messages = messages
        self._stall_s = stall_s
        self._outbox = Outbox()
        self._streams: set[asyncio.Task[None]] = set()
        #: When the decode worker was heard last, on any stream.
        self._heard = 0.0

    async def run(self) -> HandoffTotals:
        """Returns when the decode worker has everything.

        Raises RpcFailure: ABORTED when the lease has ended or is unknown there, UNAVAILABLE when the decode worker
        can't be reached or stalls, else the code that it answered with.
        """
        self._heard = time.monotonic()
        feeding = asyncio.create_task(self._feed())
        failure: StreamError | None = None
        opened = 0
        try:
            while not self._outbox.ready:
                if opened == 0 or (opened < self._transport.streams and self._outbox.backlog >= BACKLOG):
                    self._streams.add(asyncio.create_task(self._carry(opened)))
                    opened += 1
                waiting: set[asyncio.Future[None]] = {self._outbox.changed.next, *self._streams}
                if not feeding.done():
                    waiting.add(feeding)
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if feeding.done():
                    feeding.result()
                for stream in [one for one in self._streams if one.done()]:
                    self._streams.remove(stream)
                    failure = _given_up(stream) or failure
                if not self._streams and not self._outbox.ready:
                    assert failure is not None, "all streams have ended without a reason"
                    raise failure
            return self._outbox.totals
        except StreamError as error:
            code = _MEANING.get(error.code, error.code)
            raise RpcFailure(code, f"decode worker {self._address}: {error}") from None
        finally:
            await _ended({feeding, *self._streams})
            await self._messages.aclose()

    async def _feed(self) -> None:
        """Frames into the outbox, as many as its window takes. Raises RpcFailure when the engine lost the job."""
        async for message in self._messages:
            self._outbox.put(message)
            while not self._outbox.has_room:
                await asyncio.wait({self._outbox.changed.next})
        self._outbox.finish()

    async def _carry(self, number: int) -> None:
        """One stream after the other, until the decode worker has everything.

        Raises StreamError when that can't be, or when this stream is given up and the others may go on.
        """
        failures = 0
        while True:
            acknowledged = self._outbox.acknowledged
            try:
                return await self._stream(number)
            except StreamError as error:
                self._outbox.give_back(number)
                failures = 1 if self._outbox.acknowledged > acknowledged else failures + 1
                stalled = time.monotonic() - self._heard >= self._stall_s
                if error.code not in _RESUMABLE or failures > len(RESUME_AFTER_S) or stalled:
                    raise
                facts = (self._address, number, error)
                logger.info("handoff to=%s stream=%d resumes after %s", *facts, extra=about(self._request_id))
            await asyncio.sleep(RESUME_AFTER_S[failures - 1])
            self.retries += 1

    async def _stream(self, number: int) -> None:
        """One stream, until it breaks: StreamError; or until the decode worker has everything."""
        header = decode_pb2.HandoffHeader()
        header.CopyFrom(self._header)
        header.stream = number
        seal(header)
        stream = self._transport.open(number, self._metadata)
        reading: asyncio.Task[None] | None = None
        try:
            await self._send(stream, decode_pb2.HandoffRequest(header=header))
            async with self._deadline():
                self._hear(await stream.receive())
            reading = asyncio.create_task(self._read(stream))
            await self._write(stream, number, decode_pb2.HandoffRequest(header=header), reading)
        finally:
            if reading is not None:
                await _ended({reading})
            stream.close()

    async def _write(
        self, stream: Stream, number: int, header: decode_pb2.HandoffRequest, reading: asyncio.Task[None]
    ) -> None:
        """Sends what there is until `reading` ends, and heartbeats, each of which is to be answered."""
        beat, pause = time.monotonic(), min(HEARTBEAT_S, self._stall_s / 3)
        while not reading.done():
            if (message := self._outbox.take(number)) is not None:
                await self._send(stream, message)
            else:
                await asyncio.wait({self._outbox.changed.next}, timeout=max(0.0, beat + pause - time.monotonic()))
            if time.monotonic() - beat >= pause and not reading.done():
                await self._send(stream, header)
                beat = time.monotonic()
        await reading

    async def _read(self, stream: Stream) -> None:
        """Raises StreamError when the stream ends, or when no answer comes for long."""
        try:
            while not self._outbox.ready:
                async with self._deadline():
                    self._hear(await stream.receive())
        finally:
            self._outbox.changed.beat()  # the writer is to see that this has ended

    def _hear(self, response: decode_pb2.HandoffResponse) -> None:
        if not intact(response):
            raise StreamError(grpc.StatusCode.DATA_LOSS, "a response came damaged")
        self._heard = time.monotonic()
        self._outbox.acknowledge(response)

    async def _send(self, stream: Stream, message: Outgoing) -> None:
        async with self._deadline():
            await stream.send(message)

    @contextlib.asynccontextmanager
    async def _deadline(self) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(self._stall_s):
                yield
        except TimeoutError:
            raise StreamError(
                grpc.StatusCode.UNAVAILABLE, f"decode worker {self._address} did not answer for {self._stall_s:g} s"
            ) from None


def _given_up(stream: asyncio.Task[None]) -> StreamError | None:
    """Why a stream ended, where others may go on. Raises what ends the hand-off."""
    error = stream.exception()
    if error is None or (isinstance(error, StreamError) and error.code in _RESUMABLE):
        return error
    raise error


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    """Cancels the tasks and waits until they have ended; how is of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
