"""KV frames: how a rectangle of KV is cut into messages, and how damage on the way is found.

TCP's checksum misses about one damaged segment in 65,536, and a flipped bit in a KV cache shows only as a
wrong answer. So each frame carries a CRC-32C over its coordinates and its bytes.
"""

from __future__ import annotations

import grpc

from branchline.core import InvalidRequestError, KvPart, KvSpan
from branchline.v1 import decode_pb2
from branchline.wire.kv_codec import PART_TO_PROTO, KvView, kv_checksum
from branchline.wire.status import RpcFailure

#: Payload of one frame. Each message costs both sides the same whatever its size, in Python and in waking threads, so
#: 2 MiB take a tenth less processor time for a byte than 1 MiB (benchmarks/handoff.py). Larger ones gain little, fall
#: out of the processor's caches between the sender's steps, and come near gRPC's default receive limit of 4 MiB with
#: framing, below which any gRPC peer can take part.
MAX_FRAME_BYTES = 2 * 1024 * 1024

_PART_FROM_PROTO: dict[int, KvPart] = {value: part for part, value in PART_TO_PROTO.items()}


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


def read_kv_frame(frame: decode_pb2.KvFrame | KvView) -> tuple[KvSpan, bytes | memoryview]:
    """The span and its canonical bytes.

    Raises DamagedFrameError on a wrong checksum, InvalidRequestError on coordinates that are no rectangle (the
    sender's mistake, not the way's). How many bytes the span must have is the receiver's knowledge.
    """
    data = frame.data
    coordinates = (
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
    if kv_checksum(coordinates, data) != frame.crc32c:
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


def _pieces(extent: tuple[int, int], size: int) -> list[tuple[int, int]]:
    start, end = extent
    return [(at, min(at + size, end)) for at in range(start, end, size)]
