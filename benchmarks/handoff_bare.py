"""Bare gRPC byte streams, the measure of a hand-off: both ends, in messages of a frame's size.

`Stream` throws away what comes. `Checked` does the least that a hand-off with checksums can do: the sender copies each
message once and takes its CRC-32C, the receiver takes it again and copies the message once into memory of its own, all
of it hot from the call before. Neither has frames, windows, acknowledgements of frames, or an engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
from fastcrc import crc32

from branchline.wire.memory import fresh_bytes

_SERVICE = "benchmark.Bare"
#: Messages after which there is an answer.
_ANSWER = 4


async def _stream(requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    received = 0
    async for _message in requests:
        received += 1
        if received % _ANSWER == 0:
            yield b"x"
    yield b"end"


async def _checked(requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    """Messages end with their checksum; they go round a buffer of 64 MiB, larger than the processor's caches."""
    kept, at, received = np.empty(64 << 20, np.uint8), 0, 0
    async for message in requests:
        data = memoryview(message)[:-4]
        assert crc32.iscsi(data) == int.from_bytes(message[-4:], "little")
        at = 0 if at + len(data) > len(kept) else at
        kept[at : at + len(data)] = np.frombuffer(data, np.uint8)
        at += len(data)
        received += 1
        if received % _ANSWER == 0:
            yield b"x"
    yield b"end"


def add_bare(_: object, server: Any) -> None:
    """Registers both on a server."""
    handlers = {
        name: grpc.stream_stream_rpc_method_handler(behaviour, lambda data: data, lambda data: data)
        for name, behaviour in (("Stream", _stream), ("Checked", _checked))
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


async def send_bare(channels: list[Any], total: int, message_bytes: int, *, checked: bool, timeout_s: float) -> None:
    """`total` bytes, made once, over one stream for each channel; returns when all of it has come."""
    messages = max(1, round(total / message_bytes))
    payload = memoryview(bytes(range(256)) * (total // messages // 256))
    shares = [messages // len(channels) + (number < messages % len(channels)) for number in range(len(channels))]
    sending = (
        _send(channel, payload, share, checked, timeout_s) for channel, share in zip(channels, shares, strict=True)
    )
    await asyncio.gather(*sending)


async def _send(channel: Any, payload: memoryview, messages: int, checked: bool, timeout_s: float) -> None:
    call = channel.stream_stream(f"/{_SERVICE}/{'Checked' if checked else 'Stream'}")(timeout=timeout_s)
    answers = asyncio.create_task(_drain(call))
    whole = bytes(payload)
    with contextlib.suppress(asyncio.InvalidStateError):  # the call has ended; its answers say why
        for _ in range(messages):
            await call.write(_with_checksum(payload) if checked else whole)
        await call.done_writing()
    await answers


def _with_checksum(payload: memoryview) -> bytes:
    message, view = fresh_bytes(len(payload) + 4)
    view[:-4] = payload
    view[-4:] = crc32.iscsi(view[:-4]).to_bytes(4, "little")
    return message


async def _drain(call: Any) -> None:
    async for _ in call:
        pass
