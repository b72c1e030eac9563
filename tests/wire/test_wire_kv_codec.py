"""Our own way of writing and reading KV frames beside protobuf's."""

from __future__ import annotations

import contextlib
import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from branchline.core import KvPart, KvSpan
from branchline.v1 import decode_pb2
from branchline.wire.kv_codec import KvDraft, KvView, kv_checksum, kv_message, parse_request, part_of, request_bytes

NUMBERS = ("index", "layer_start", "layer_end", "head_start", "head_end", "token_start", "token_end", "sample")
extents = st.tuples(st.integers(0, 2**31), st.integers(1, 2**31 - 1)).map(lambda pair: (pair[0], sum(pair)))
spans = st.builds(KvSpan, st.sampled_from(KvPart), layers=extents, heads=extents, tokens=extents)
words = st.integers(0, 2**32 - 1)


@given(words, spans, st.binary(max_size=300), words)
def test_the_bytes_are_those_that_protobuf_makes(index: int, span: KvSpan, data: bytes, sample: int) -> None:
    message = kv_message(index, span, data, sample)
    assert (message.index, message.kv_bytes) == (index, len(data))
    request = decode_pb2.HandoffRequest.FromString(message.encoded)
    assert request.SerializeToString() == message.encoded == request_bytes(request) == request_bytes(message)
    frame = request.kv
    assert frame.data == data
    assert (frame.layer_start, frame.layer_end) == span.layers
    assert (frame.head_start, frame.head_end) == span.heads
    assert (frame.token_start, frame.token_end) == span.tokens
    assert (frame.index, frame.sample) == (index, sample)
    coordinates = (index, frame.part, *span.layers, *span.heads, *span.tokens, sample)
    assert frame.crc32c == kv_checksum(coordinates, data)


def same(ours: bytes) -> bool:
    """Whether we read the same from these bytes as protobuf does; True also where both refuse them."""
    try:
        theirs = decode_pb2.HandoffRequest.FromString(ours)
    except DecodeError:
        with pytest.raises(DecodeError):
            parse_request(ours)
        return True
    name, frame = part_of(parse_request(ours))
    if name != theirs.WhichOneof("part"):
        return False
    if name != "kv":
        return frame == (None if name is None else getattr(theirs, name))
    values = [getattr(frame, field) == getattr(theirs.kv, field) for field in (*NUMBERS, "part", "crc32c")]
    return all(values) and bytes(frame.data) == theirs.kv.data


@given(words, words, st.integers(-(2**31), 2**31 - 1), words, words, st.binary(max_size=300))
def test_what_protobuf_writes_is_read(
    index: int, layer_end: int, part: int, crc: int, sample: int, data: bytes
) -> None:
    frame = decode_pb2.KvFrame(index=index, layer_end=layer_end, part=part, crc32c=crc, sample=sample, data=data)
    assert same(decode_pb2.HandoffRequest(kv=frame).SerializeToString())


def test_damaged_bytes_are_read_as_protobuf_reads_them() -> None:
    """Flipped bits, cut ends and things put in between: lengths, tags and numbers that are none."""
    generator = random.Random(0)
    sent = kv_message(300, KvSpan(KvPart.DRAFT, (0, 3), (1, 2), (5, 900)), bytes(range(60)), sample=2).encoded
    views = 0
    for _ in range(20_000):
        damaged = bytearray(sent)
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(damaged))
            match generator.randrange(4):
                case 0:
                    damaged[at] ^= 1 << generator.randrange(8)
                case 1:
                    del damaged[at:]
                case 2:
                    damaged[at:at] = generator.randbytes(generator.randrange(1, 5))
                case _:
                    damaged[at % 30 if at % 30 < len(damaged) else at] = generator.choice((0x80, 0xFF, 0, 0x12))
            if not damaged:
                break
        assert same(bytes(damaged)), damaged.hex()
        with contextlib.suppress(DecodeError):
            views += isinstance(parse_request(bytes(damaged)), KvView)
    assert views > 1000


def test_data_is_neither_copied_in_nor_out() -> None:
    draft = KvDraft(0, KvSpan(KvPart.TARGET, (0, 1), (0, 1), (0, 1)), 4)
    draft.data[:] = b"abcd"
    message = draft.seal()
    view = parse_request(message.encoded)
    assert isinstance(view, KvView)
    assert view.data.obj is message.encoded
    assert view.data.readonly
    with pytest.raises(ValueError, match="released"):
        draft.data[0] = 0


def test_other_requests_go_through_protobuf() -> None:
    for request in (
        decode_pb2.HandoffRequest(header=decode_pb2.HandoffHeader(lease_id="lease", stream=3)),
        decode_pb2.HandoffRequest(draft=decode_pb2.DraftFrame(index=4)),
        decode_pb2.HandoffRequest(),
    ):
        assert parse_request(request_bytes(request)) == request
    assert part_of(decode_pb2.HandoffRequest()) == (None, None)
