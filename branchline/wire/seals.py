"""Checksums of the hand-off's small messages: headers, draft frames, commits and responses. KV frames have `frames`.

A flipped bit in one of these does as much harm as one in the KV: another lease's id, another first token, a frame
acknowledged that never came. protobuf's bytes are not the same from every implementation, so each checksum covers the
message's values, packed in an order of their own (decode.proto says which).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from fastcrc import crc32

from branchline.v1 import decode_pb2

Sealed = decode_pb2.HandoffHeader | decode_pb2.DraftFrame | decode_pb2.CommitFrame | decode_pb2.HandoffResponse


def seal(message: Sealed) -> None:
    """Sets the checksum, over what the message says now."""
    message.crc32c = checksum(message)


def intact(message: Sealed) -> bool:
    """Whether the message is what was sealed."""
    return message.crc32c == checksum(message)


def checksum(message: Sealed) -> int:
    """CRC-32C of the message's values."""
    match message:
        case decode_pb2.HandoffHeader():
            packed = _words(message.stream) + _text(message.lease_id) + _text(message.kv_dtype)
        case decode_pb2.DraftFrame():
            packed = _draft(message)
        case decode_pb2.CommitFrame():
            packed = struct.pack("<IQ", message.frames, message.kv_bytes)
        case decode_pb2.HandoffResponse():
            packed = _words(message.next_index, message.ready, *message.resend)
    return crc32.iscsi(packed)


def _draft(message: decode_pb2.DraftFrame) -> bytes:
    packed = _words(message.index, message.first_token, message.sample, len(message.tree_tokens))
    packed += _words(*message.tree_tokens) + _words(*message.tree_parents) + _floats(message.tree_scores)
    if not message.HasField("first_logprobs"):
        return packed + _words(0)
    logprobs = message.first_logprobs
    packed += _words(1) + _floats([logprobs.logprob]) + _words(len(logprobs.top_token_ids))
    return packed + _words(*logprobs.top_token_ids) + _floats(logprobs.top_logprobs)


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _floats(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _words(len(encoded)) + encoded
