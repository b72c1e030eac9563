from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from branchline.core import DraftTree, TokenLogprobs
from branchline.v1 import decode_pb2
from branchline.wire.convert import tree_to_proto
from branchline.wire.seals import Sealed, intact, seal

TREE = DraftTree((4, 6), (0, 1), (-0.5, float("-inf")))
MESSAGES: list[Sealed] = [
    decode_pb2.HandoffHeader(lease_id="c0ffee.1.17", kv_dtype="bfloat16", stream=3),
    tree_to_proto(TREE, index=7, first_token=5, sample=1, logprobs=TokenLogprobs(-0.25, ((5, -0.25), (9, -1.5)))),
    tree_to_proto(DraftTree(), index=0, first_token=0),
    decode_pb2.CommitFrame(frames=9, kv_bytes=2**33),
    decode_pb2.HandoffResponse(next_index=5),
    decode_pb2.HandoffResponse(next_index=5, ready=True),
    decode_pb2.HandoffResponse(next_index=5, resend=[6, 8]),
]


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_damage_to_any_bit_is_found(message: Sealed) -> None:
    """Or it means the same: a flag's other encodings, a field that nobody knows in place of one that says nothing."""
    seal(message)
    sent = message.SerializeToString()
    assert intact(type(message).FromString(sent))
    for bit in range(len(sent) * 8):
        damaged = bytearray(sent)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            received = type(message).FromString(bytes(damaged))
        except DecodeError:
            continue
        received.DiscardUnknownFields()
        assert received == message or not intact(received)


def test_an_unsealed_message_is_not_intact() -> None:
    assert not intact(decode_pb2.CommitFrame(frames=1))
    assert not intact(decode_pb2.HandoffResponse())


def test_texts_do_not_run_into_each_other() -> None:
    one = decode_pb2.HandoffHeader(lease_id="ab", kv_dtype="c")
    other = decode_pb2.HandoffHeader(lease_id="a", kv_dtype="bc")
    seal(one)
    other.crc32c = one.crc32c
    assert not intact(other)
