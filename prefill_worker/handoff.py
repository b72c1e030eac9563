"""The sending side of a hand-off: messages to the decode worker, resumed when the stream breaks.

One coroutine waits for whichever comes first: the next message, an acknowledgement, or the time for a heartbeat.
Messages stay in hand until they are acknowledged, up to `WINDOW_BYTES`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import grpc

from branchline.v1 import decode_pb2
from branchline.wire.status import RpcFailure, describe

#: Bytes sent and not acknowledged yet.
WINDOW_BYTES = 16 << 20
#: Silence after which the header is sent again, so that the lease lives through a slow chunk.
HEARTBEAT_S = 1.0
#: Pauses before a broken stream is opened again; after the last attempt the hand-off has failed.
RESUME_AFTER_S = (0.05, 0.2, 0.5)

#: INTERNAL: what gRPC says of a write that met the end of its call, in place of the status that ended it. The next
#: stream gets the real reason.
_RESUMABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.INTERNAL)

#: What an answer of the decode worker means to the gateway, where it isn't what the code says to us.
_MEANING = {
    grpc.StatusCode.NOT_FOUND: grpc.StatusCode.ABORTED,  # it has restarted since it gave the lease
    grpc.StatusCode.DATA_LOSS: grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED: grpc.StatusCode.UNAVAILABLE,  # it is stopping
    grpc.StatusCode.DEADLINE_EXCEEDED: grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INVALID_ARGUMENT: grpc.StatusCode.INTERNAL,  # our frames are wrong, not the client's request
}


@dataclass(frozen=True, slots=True)
class HandoffTotals:
    frames: int
    kv_bytes: int
    tree_nodes: int


class HandoffSender:
    """Ships one request's hand-off to the lease at the other end of `stub`.

    `stall_s`: how long the decode worker may take to answer or to take a message.
    """

    def __init__(
        self,
        stub: Any,
        address: str,
        header: decode_pb2.HandoffHeader,
        messages: AsyncGenerator[decode_pb2.HandoffRequest],
        stall_s: float,
    ) -> None:
        self._stub = stub
        self._address = address
        self._header = decode_pb2.HandoffRequest(header=header)
        self._messages = messages
        self._stall_s = stall_s
        #: The next message on its way from the engine; it outlives a broken stream.
        self._next: asyncio.Task[decode_pb2.HandoffRequest | None] | None = None
        self._exhausted = False
        #: Sent but not acknowledged, in order.
        self._unacknowledged: deque[decode_pb2.HandoffRequest] = deque()
        self._window = 0
        self._heard = 0.0
        self._frames = 0
        self._kv_bytes = 0
        self._tree_nodes = 0

    async def run(self) -> HandoffTotals:
        """Returns when the decode worker has everything.

        Raises RpcFailure: ABORTED when the lease has ended or is unknown there, UNAVAILABLE when the decode worker
        can't be reached or stalls, else the code that it answered with.
        """
        try:
            for pause in RESUME_AFTER_S:
                try:
                    return await self._stream()
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _RESUMABLE:
                        raise self._failure(error) from None
                await asyncio.sleep(pause)
            return await self._stream()
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from None
        finally:
            await self._close()

    async def _stream(self) -> HandoffTotals:
        """One stream, from the frame that the receiver expects to the end. Raises AioRpcError when it breaks."""
        call = self._stub.Handoff()
        acknowledgement: asyncio.Task[Any] | None = None
        try:
            self._heard = time.monotonic()
            await self._write(call, self._header)
            async with self._deadline():
                self._acknowledge(await _read(call))
            for message in tuple(self._unacknowledged):
                await self._write(call, message)
            if self._exhausted:
                await self._write(call, self._commit())
            acknowledgement = asyncio.create_task(_read(call))
            while True:
                await self._wait(acknowledgement)
                if acknowledgement.done():
                    if self._acknowledge(acknowledgement.result()):
                        return HandoffTotals(self._frames, self._kv_bytes, self._tree_nodes)
                    acknowledgement = asyncio.create_task(_read(call))
                elif self._next is not None and self._next.done():
                    await self._send_next(call)
                else:
                    await self._heartbeat(call)
        finally:
            if acknowledgement is not None:
                acknowledgement.add_done_callback(_seen)
                acknowledgement.cancel()
            call.cancel()

    async def _wait(self, acknowledgement: asyncio.Task[Any]) -> None:
        waiting = {acknowledgement}
        if not self._exhausted and self._window < WINDOW_BYTES:
            if self._next is None:
                self._next = asyncio.create_task(_next(self._messages))
            waiting.add(self._next)
        await asyncio.wait(waiting, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)

    async def _send_next(self, call: Any) -> None:
        assert self._next is not None
        message = self._next.result()
        self._next = None
        if message is None:
            self._exhausted = True
            await self._write(call, self._commit())
            return
        if not self._unacknowledged:
            self._heard = time.monotonic()  # it had nothing to answer until now
        self._unacknowledged.append(message)
        self._window += _size(message)
        self._frames += 1
        self._kv_bytes += len(message.kv.data)
        self._tree_nodes += len(message.draft.tree_tokens)
        await self._write(call, message)

    async def _heartbeat(self, call: Any) -> None:
        owes_answer = self._exhausted or bool(self._unacknowledged)
        if owes_answer and time.monotonic() - self._heard > self._stall_s:
            raise self._stalled()
        await self._write(call, self._header)

    def _acknowledge(self, response: decode_pb2.HandoffResponse) -> bool:
        """Drops what the receiver has; True when it has all of it."""
        self._heard = time.monotonic()
        while self._unacknowledged and _index(self._unacknowledged[0]) < response.next_index:
            self._window -= _size(self._unacknowledged.popleft())
        return response.ready

    def _commit(self) -> decode_pb2.HandoffRequest:
        return decode_pb2.HandoffRequest(commit=decode_pb2.CommitFrame(frames=self._frames, kv_bytes=self._kv_bytes))

    async def _write(self, call: Any, message: decode_pb2.HandoffRequest) -> None:
        async with self._deadline():
            try:
                await call.write(message)
            except asyncio.InvalidStateError:  # the receiver has ended the call
                await _read(call)  # raises its status
                raise

    @contextlib.asynccontextmanager
    async def _deadline(self) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(self._stall_s):
                yield
        except TimeoutError:
            raise self._stalled() from None

    def _stalled(self) -> RpcFailure:
        return RpcFailure(
            grpc.StatusCode.UNAVAILABLE, f"decode worker {self._address} did not answer for {self._stall_s:g} s"
        )

    def _failure(self, error: grpc.aio.AioRpcError) -> RpcFailure:
        code = _MEANING.get(error.code(), error.code())
        return RpcFailure(code, f"decode worker {self._address}: {describe(error)}")

    async def _close(self) -> None:
        if self._next is not None:
            self._next.add_done_callback(_seen)
            self._next.cancel()
            await asyncio.wait({self._next})  # a generator can't be closed while somebody waits for it
        await self._messages.aclose()


async def _next(messages: AsyncGenerator[decode_pb2.HandoffRequest]) -> decode_pb2.HandoffRequest | None:
    return await anext(messages, None)


async def _read(call: Any) -> decode_pb2.HandoffResponse:
    """The next response. Raises AioRpcError when the call has failed, RpcFailure when it ended too early."""
    response = await call.read()
    if response is grpc.aio.EOF:
        raise RpcFailure(grpc.StatusCode.INTERNAL, "the decode worker ended the hand-off before its end")
    assert isinstance(response, decode_pb2.HandoffResponse)
    return response


def _index(message: decode_pb2.HandoffRequest) -> int:
    return message.kv.index if message.WhichOneof("part") == "kv" else message.draft.index


def _size(message: decode_pb2.HandoffRequest) -> int:
    return len(message.kv.data)


def _seen(future: asyncio.Future[Any]) -> None:
    """For futures that nobody may come to await: their error is not to be reported as forgotten."""
    if not future.cancelled():
        future.exception()
