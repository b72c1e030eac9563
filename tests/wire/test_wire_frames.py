from __future__ import annotations

import itertools

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from branchline.core import InvalidRequestError, KvPart, KvSpan
from branchline.v1 import decode_pb2
from branchline.wire.channels import MAX_MESSAGE_BYTES
from branchline.wire.frames import MAX_FRAME_BYTES, DamagedFrameError, read_kv_frame, split_span
from branchline.wire.kv_codec import kv_checksum, kv_message, parse_request, part_of


def extents(longest: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, 5000), st.integers(1, longest)).map(lambda pair: (pair[0], sum(pair)))


def kv_frame(index: int, span: KvSpan, data: bytes) -> decode_pb2.KvFrame:
    return decode_pb2.HandoffRequest.FromString(kv_message(index, span, data).encoded).kv


def sealed_anew(frame: decode_pb2.KvFrame) -> decode_pb2.KvFrame:
    ranges = (frame.layer_start, frame.layer_end, frame.head_start, frame.head_end, frame.token_start, frame.token_end)
    frame.crc32c = kv_checksum((frame.index, frame.part, *ranges, frame.sample), frame.data)
    return frame


spans = st.builds(KvSpan, st.sampled_from(KvPart), layers=extents(12), heads=extents(8), tokens=extents(60))


def cells(span: KvSpan) -> list[tuple[int, int]]:
    """The (layer, token) cells in canonical order."""
    return list(itertools.product(range(*span.layers), range(*span.tokens)))


@given(spans, st.integers(1, 500), st.integers(1, 5000))
def test_a_split_covers_every_cell_once_and_in_order(span: KvSpan, cell_bytes: int, max_bytes: int) -> None:
    pieces = split_span(span, cell_bytes, max_bytes)
    assert [cell for piece in pieces for cell in cells(piece)] == cells(span)
    assert all((piece.part, piece.heads) == (span.part, span.heads) for piece in pieces)
    assert all(len(cells(piece)) * cell_bytes <= max_bytes or len(cells(piece)) == 1 for piece in pieces)


@given(spans, st.integers(1, 500), st.integers(1, 5000))
def test_a_split_is_not_finer_than_needed(span: KvSpan, cell_bytes: int, max_bytes: int) -> None:
    """Whole layers stay together if one fits; layers that don't are cut into as few pieces as possible."""
    layers, tokens = span.layers[1] - span.layers[0], span.tokens[1] - span.tokens[0]
    pieces = len(split_span(span, cell_bytes, max_bytes))
    if tokens * cell_bytes <= max_bytes:
        assert pieces == -(-layers // (max_bytes // (tokens * cell_bytes)))
    else:
        assert pieces == layers * -(-tokens // max(1, max_bytes // cell_bytes))


def test_the_default_model_ships_its_prompt_in_frames_that_are_nearly_full() -> None:
    cell_bytes = 2 * 3 * 64 * 2  # K and V, 3 heads of 64, bfloat16
    span = KvSpan(KvPart.TARGET, layers=(0, 30), heads=(0, 3), tokens=(0, 512))
    sizes = [len(cells(piece)) * cell_bytes for piece in split_span(span, cell_bytes)]
    assert sum(sizes) == 512 * 30 * cell_bytes
    assert all(MAX_FRAME_BYTES // 2 < size <= MAX_FRAME_BYTES for size in sizes)
    assert MAX_FRAME_BYTES + 1024 < 4 << 20 < MAX_MESSAGE_BYTES  # gRPC's default, so that any peer can take part


@pytest.mark.parametrize(("cell_bytes", "max_bytes"), [(0, 1), (1, 0)])
def test_sizes_must_be_positive(cell_bytes: int, max_bytes: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        split_span(KvSpan(KvPart.TARGET, (0, 1), (0, 1), (0, 1)), cell_bytes, max_bytes)


@given(spans, st.integers(0, 2**32 - 1), st.binary(max_size=200))
def test_a_frame_survives_the_wire(span: KvSpan, index: int, data: bytes) -> None:
    _, frame = part_of(parse_request(kv_message(index, span, data).encoded))
    assert frame.index == index
    assert read_kv_frame(frame) == (span, data)


def test_damage_to_any_bit_is_found() -> None:
    """Of the data, of the coordinates, of the checksum itself, of the message's own bookkeeping; read as we do and as
    protobuf does."""
    span = KvSpan(KvPart.TARGET, layers=(2, 4), heads=(1, 3), tokens=(16, 300))
    sent = kv_message(7, span, bytes(range(40)), sample=3).encoded
    for bit in range(len(sent) * 8):
        damaged = bytearray(sent)
        damaged[bit // 8] ^= 1 << bit % 8
        for parse in (parse_request, decode_pb2.HandoffRequest.FromString):
            try:
                name, frame = part_of(parse(bytes(damaged)))
            except DecodeError:
                continue
            if name == "kv":  # else there is no frame, which a receiver can't take for one
                with pytest.raises(DamagedFrameError):
                    read_kv_frame(frame)


def test_damage_is_data_loss() -> None:
    frame = kv_frame(3, KvSpan(KvPart.DRAFT, (0, 1), (0, 1), (0, 1)), b"abcd")
    frame.data = b"abce"
    with pytest.raises(DamagedFrameError, match="KV frame 3") as caught:
        read_kv_frame(frame)
    assert caught.value.code is grpc.StatusCode.DATA_LOSS


def test_an_intact_frame_without_a_part_is_the_senders_mistake() -> None:
    frame = kv_frame(0, KvSpan(KvPart.TARGET, (0, 1), (0, 1), (0, 1)), b"abcd")
    frame.part = decode_pb2.KV_PART_UNSPECIFIED
    with pytest.raises(InvalidRequestError, match="part"):
        read_kv_frame(sealed_anew(frame))
    frame.part = decode_pb2.KV_PART_TARGET
    frame.token_end = 0
    with pytest.raises(InvalidRequestError, match="tokens"):
        read_kv_frame(sealed_anew(frame))
