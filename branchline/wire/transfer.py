"""The seam between a hand-off and what carries it from one worker to the other.

The sender (`prefill_worker.handoff`) knows a `Transport`; the receiver (`decode_worker.handoff`) is called with one
stream's requests and yields its responses. What a transport promises is little: whole messages, and the news when a
stream has ended. Messages may be damaged, since each has a checksum; frames may be lost, doubled or overtaken; and a
stream may break at any moment, since another goes on from what has arrived.

A transport that moves bytes by reference (NIXL, Ray Direct Transport) goes here as well: its KV frames carry, instead
of `data`, where the bytes lie in the sender's registered memory, and the decode worker's side reads them from there
before it hands the frame on. The rest stays as it is: lease, coordinates, acknowledgement (after which the sender
may reuse the memory), totals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import grpc

from branchline.v1 import decode_pb2
from branchline.wire.kv_codec import Outgoing, request_bytes
from branchline.wire.status import RpcFailure

#: Streams of one hand-off; the decode worker refuses higher numbers.
MAX_STREAMS = 8
#: How far a frame's index may be above the lowest one that is not acknowledged.
MAX_AHEAD = 4096

_HANDOFF = "/branchline.v1.DecodeService/Handoff"


class StreamError(RpcFailure):
    """A stream has ended before the hand-off; `code` says how."""


class Stream(Protocol):
    """One way to a lease and back. Sending and receiving go on at the same time, each by one coroutine.

    Cancelling either leaves the stream fit for `close` alone.
    """

    async def send(self, message: Outgoing) -> None:
        """Returns when there is room for more. Raises StreamError when the stream has ended."""

    async def receive(self) -> decode_pb2.HandoffResponse:
        """The next response. Raises StreamError when the stream has ended, or for a response that can't be parsed."""

    def close(self) -> None:
        """Gives the stream up, with whatever is on its way. No error when it has ended."""


class Transport(Protocol):
    """The ways to one decode worker."""

    @property
    def streams(self) -> int:
        """How many streams a hand-off may use at once, at least 1."""

    def open(self, number: int, metadata: Sequence[tuple[str, str]] = ()) -> Stream:
        """A new stream, number 0 ≤ `number` < `streams`; it connects with the first message. `metadata`: for the other
        end, if the transport can carry any.
        """


class GrpcTransport:
    """Streams of `DecodeService.Handoff`, each through a channel of its own: one channel is one TCP connection, whose
    two ends are served by one thread each."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        assert 1 <= len(channels) <= MAX_STREAMS, len(channels)
        self._channels = channels

    @property
    def streams(self) -> int:
        return len(self._channels)

    def open(self, number: int, metadata: Sequence[tuple[str, str]] = ()) -> Stream:
        # Not the generated stub's, which would copy the KV into protobuf's bytes once more.
        open_stream = self._channels[number].stream_stream(
            _HANDOFF, request_serializer=request_bytes, response_deserializer=decode_pb2.HandoffResponse.FromString
        )
        return _GrpcStream(open_stream(metadata=metadata))


class _GrpcStream:
    def __init__(self, call: Any) -> None:
        self._call = call

    async def send(self, message: Outgoing) -> None:
        try:
            await self._call.write(message)
        except asyncio.InvalidStateError:  # the call has ended; its status says why
            raise await self._ending() from None
        except grpc.aio.AioRpcError as error:
            raise _stream_error(error) from None

    async def receive(self) -> decode_pb2.HandoffResponse:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _stream_error(error) from None
        if response is grpc.aio.EOF:
            raise await self._ending()
        if response is None:  # gRPC's way to say that it can't parse the message
            raise StreamError(grpc.StatusCode.DATA_LOSS, "a response came damaged")
        assert isinstance(response, decode_pb2.HandoffResponse)
        return response

    def close(self) -> None:
        self._call.cancel()

    async def _ending(self) -> StreamError:
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return StreamError(grpc.StatusCode.UNAVAILABLE, "the stream ended before the hand-off")
        return StreamError(code, await self._call.details() or "(no details)")


def _stream_error(error: grpc.aio.AioRpcError) -> StreamError:
    return StreamError(error.code(), error.details() or "(no details)")
