"""KV frames: how a rectangle of KV is cut into messages, and how damage on the way is found.

TCP's checksum misses about one damaged segment in 65,536, and a flipped bit in a KV cache shows only as a
wrong answer. So each frame carries a CRC-32C over its coordinates and its bytes.
"""

from __future__ import annotations

import struct

import crc32c
import grpc

from branchline.core import InvalidRequestError, KvPart, KvSpan
from branchline.v1 import decode_pb2
from branchline.wire.status import RpcFailure

#: Payload of one frame. gRPC in Python over loopback is fastest with messages of 256 KiB to 1 MiB and falls off
#: on both sides (16 KiB: a fifth, the cost is per message; 16 MiB: slower again, each message is copied into fresh
#: memory). The upper end of the plateau costs the fewest messages. It also stays below gRPC's default receive
#: limit of 4 MiB with framing, so any gRPC peer can take part.
MAX_FRAME_BYTES = 1024 * 1024

_PART_TO_PROTO = {KvPart.TARGET: decode_pb2.KV_PART_TARGET, KvPart.DRAFT: decode_pb2.KV_PART_DRAFT}
_PART_FROM_PROTO = {value: part for part, value in _PART_TO_PROTO.items()}

#: index, part, then layers, heads and tokens as start and end, sample: what the checksum covers before the data.
_COORDINATES = struct.Struct("<9I")


class DamagedFrameError(RpcFailure):
    """A frame is not what was sent. Maps to DATA_LOSS; the sender may send it again."""

    def __init__(self, details: str) -> None:
        super().__init__(grpc.StatusCode.DATA_LOSS, details)


def split_span(span: KvSpan, bytes_per_layer_token: int, max_bytes: int = MAX_FRAME_BYTES) -> list[KvSpan]:
    """Cuts `span` into spans of at most `max_bytes`, in canonical order; together they cover it exactly.

    `bytes_per_layer_token` is the size of K and V of one token in one layer over the span's heads. Whole layers
    stay together as long as they fit, else each layer is cut by tokens. One token of one layer is never cut,
    even when it is larger than `max_bytes`.
    """
    if bytes_per_layer_token < 1 or max_bytes < 1:
        raise ValueError(f"sizes must be positive, got {bytes_per_layer_token=} {max_bytes=}")
    tokens = span.tokens[1] - span.tokens[0]
    layers_per_frame = max(1, max_bytes // (bytes_per_layer_token * tokens))
    tokens_per_frame = tokens if bytes_per_layer_token * tokens <= max_bytes else max_bytes // bytes_per_layer_token
    return [
        KvSpan(span.part, layers, span.heads, token_range)
        for layers in _pieces(span.layers, layers_per_frame)
        for token_range in _pieces(span.tokens, max(1, tokens_per_frame))
    ]


def kv_request(index: int, span: KvSpan, data: bytes, sample: int = 0) -> decode_pb2.HandoffRequest:
    """A request with `kv_frame`. The frame is made in its place: set as a field, a message is copied with its bytes."""
    request = decode_pb2.HandoffRequest()
    _fill(request.kv, index, span, data, sample)
    return request


def kv_frame(index: int, span: KvSpan, data: bytes, sample: int = 0) -> decode_pb2.KvFrame:
    """The hand-off's frame number `index`, carrying the canonical bytes of `span`."""
    frame = decode_pb2.KvFrame()
    _fill(frame, index, span, data, sample)
    return frame


def _fill(frame: decode_pb2.KvFrame, index: int, span: KvSpan, data: bytes, sample: int) -> None:
    frame.index = index
    frame.part = _PART_TO_PROTO[span.part]
    frame.layer_start, frame.layer_end = span.layers
    frame.head_start, frame.head_end = span.heads
    frame.token_start, frame.token_end = span.tokens
    frame.sample = sample
    frame.data = data
    frame.crc32c = _checksum(frame, data)


def read_kv_frame(frame: decode_pb2.KvFrame) -> tuple[KvSpan, bytes]:
    """The span and its canonical bytes.

    Raises DamagedFrameError on a wrong checksum, InvalidRequestError on coordinates that are no rectangle (the
    sender's mistake, not the way's). How many bytes the span must have is the receiver's knowledge.
    """
    data = frame.data
    if _checksum(frame, data) != frame.crc32c:
        raise DamagedFrameError(f"KV frame {frame.index}: wrong checksum")
    part = _PART_FROM_PROTO.get(frame.part)
    if part is None:
        raise InvalidRequestError(f"KV frame {frame.index}: part {frame.part} is unknown")
    span = KvSpan(
        part,
        layers=(frame.layer_start, frame.layer_end),
        heads=(frame.head_start, frame.head_end),
        tokens=(frame.token_start, frame.token_end),
    )
    return span, data


def _checksum(frame: decode_pb2.KvFrame, data: bytes) -> int:
    coordinates = _COORDINATES.pack(
        frame.index,
        frame.part & 0xFFFF_FFFF,  # a damaged enum may be negative
        frame.layer_start,
        frame.layer_end,
        frame.head_start,
        frame.head_end,
        frame.token_start,
        frame.token_end,
        frame.sample,
    )
    checksum: int = crc32c.crc32c(data, crc32c.crc32c(coordinates))
    return checksum


def _pieces(extent: tuple[int, int], size: int) -> list[tuple[int, int]]:
    start, end = extent
    return [(at, min(at + size, end)) for at in range(start, end, size)]
