"""KV frames on the wire without protobuf's copies: a `HandoffRequest` with `kv` written around its data, and read
around it.

The generated class copies the data when it is set, when the message is serialised, when it is parsed and when the
data is asked for. Here the sender makes the message's bytes first and lets the KV be copied straight into them, and the
receiver looks at the data where gRPC has put it. The bytes are those that the generated class would make, so any
protobuf peer can take part on either side; what is not simply a KV frame goes through the generated class.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from fastcrc import crc32

from branchline.core import KvPart, KvSpan
from branchline.v1 import decode_pb2
from branchline.wire.memory import fresh_bytes

PART_TO_PROTO = {KvPart.TARGET: decode_pb2.KV_PART_TARGET, KvPart.DRAFT: decode_pb2.KV_PART_DRAFT}

# Tags: field number and wire type. The fields of KvFrame but crc32c and data are varints.
_KV, _CRC32C, _DATA = 2 << 3 | 2, 9 << 3 | 5, 10 << 3 | 2
_VARINTS = {number << 3: number for number in (1, 2, 3, 4, 5, 6, 7, 8, 11)}
_SAMPLE = 11
#: Larger numbers, which protobuf cuts off or takes for negative ones, are left to it.
_MAX_WORD, _MAX_ENUM = 2**32 - 1, 2**31 - 1

#: index, part, then layers, heads and tokens as start and end, sample: what the checksum covers before the data.
_COORDINATES = struct.Struct("<9I")


@dataclass(frozen=True, slots=True)
class KvMessage:
    """A request with a KV frame, ready to be sent: frame number, bytes of KV, the message."""

    index: int
    kv_bytes: int
    encoded: bytes


@dataclass(frozen=True, slots=True)
class KvView:
    """The fields of a `KvFrame` that has come; `data` lies in the message that brought it."""

    index: int
    part: int
    layer_start: int
    layer_end: int
    head_start: int
    head_end: int
    token_start: int
    token_end: int
    crc32c: int
    data: memoryview
    sample: int


#: What a sender gives to a transport, and what a receiver gets from one.
Outgoing = decode_pb2.HandoffRequest | KvMessage
Incoming = decode_pb2.HandoffRequest | KvView


class KvDraft:
    """A message in the making: fill `data`, then `seal` it, once."""

    def __init__(self, index: int, span: KvSpan, kv_bytes: int, sample: int = 0) -> None:
        fields = (index, PART_TO_PROTO[span.part], *span.layers, *span.heads, *span.tokens)
        numbers = b"".join(
            bytes([number << 3]) + _varint(value) for number, value in enumerate(fields, 1) if value != 0
        )
        self._tail = bytes([_SAMPLE << 3]) + _varint(sample) if sample else b""
        data_head = bytes([_DATA]) + _varint(kv_bytes) if kv_bytes else b""
        length = len(numbers) + 5 + len(data_head) + kv_bytes + len(self._tail)
        # protobuf leaves out what is 0; a checksum of 0 is written all the same, which every parser takes.
        head = bytes([_KV]) + _varint(length) + numbers + bytes([_CRC32C])
        self.span = span
        self._index = index
        self._coordinates = (*fields, sample)
        self._encoded, view = fresh_bytes(len(head) + 4 + len(data_head) + kv_bytes + len(self._tail))
        self._crc = len(head)
        at = self._crc + 4 + len(data_head)
        view[: self._crc] = head
        view[self._crc + 4 : at] = data_head
        view[at + kv_bytes :] = self._tail
        self._view = view
        #: Writable, not initialised.
        self.data = view[at : at + kv_bytes]

    def seal(self) -> KvMessage:
        checksum = kv_checksum(self._coordinates, self.data)
        self._view[self._crc : self._crc + 4] = checksum.to_bytes(4, "little")
        message = KvMessage(self._index, self.data.nbytes, self._encoded)
        self.data.release()
        self._view.release()  # from here on the bytes are what bytes are: immutable
        return message


def kv_message(index: int, span: KvSpan, data: bytes, sample: int = 0) -> KvMessage:
    """The hand-off's frame number `index`, carrying the canonical bytes of `span`."""
    draft = KvDraft(index, span, len(data), sample)
    draft.data[:] = data
    return draft.seal()


def kv_checksum(coordinates: tuple[int, ...], data: bytes | memoryview) -> int:
    """CRC-32C of a KV frame: `coordinates` are index, part, layers, heads and tokens as start and end, sample."""
    return crc32.iscsi(data, crc32.iscsi(_COORDINATES.pack(*coordinates)))


def part_of(request: Incoming) -> tuple[str | None, Any]:
    """The name of a request's part in `HandoffRequest`, and the part."""
    if isinstance(request, KvView):
        return "kv", request
    name = request.WhichOneof("part")
    return name, None if name is None else getattr(request, name)


def parse_request(message: bytes) -> Incoming:
    """A request of the hand-off from protobuf's bytes. Raises DecodeError when it is none."""
    return _view(message) or decode_pb2.HandoffRequest.FromString(message)


def request_bytes(message: Outgoing) -> bytes:
    """A request of the hand-off as protobuf's bytes."""
    return message.encoded if isinstance(message, KvMessage) else message.SerializeToString()


def _view(message: bytes) -> KvView | None:
    """None for what isn't a KV frame, and for one that isn't written as everybody writes it."""
    if not message or message[0] != _KV:
        return None
    end, values, data = len(message), [0] * 12, None
    length, at = _read_varint(message, 1)
    if at + length != end:
        return None
    while at < end:
        tag, at = message[at], at + 1
        if (number := _VARINTS.get(tag)) is not None:
            values[number], at = _read_varint(message, at)
        elif tag == _CRC32C:
            values[9], at = int.from_bytes(message[at : at + 4], "little"), at + 4
        elif tag == _DATA:
            length, at = _read_varint(message, at)
            data, at = memoryview(message)[at : at + length], at + length
        else:
            return None
    if at != end or values[2] > _MAX_ENUM:
        return None
    index, part, layer_start, layer_end, head_start, head_end, token_start, token_end, crc = values[1:10]
    ranges = (layer_start, layer_end, head_start, head_end, token_start, token_end)
    return KvView(index, part, *ranges, crc, memoryview(b"") if data is None else data, values[_SAMPLE])


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A number below 2^32 and where it ends; behind the message's end where there is no such number."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value, at) if value <= _MAX_WORD else (0, len(message) + 1)
    return 0, len(message) + 1
