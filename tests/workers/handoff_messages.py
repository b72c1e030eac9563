"""Hand-offs made by hand: the right messages for the tiny model, with zeros for KV, to be spoilt by tests."""

from __future__ import annotations

from typing import Any

import grpc
from model_helpers import HEAD_DIM, KV_HEADS, LAYERS

from branchline.core import DraftTree, KvPart, KvSpan, TokenLogprobs
from branchline.v1 import decode_pb2
from branchline.wire.convert import tree_to_proto
from branchline.wire.kv_codec import KvMessage, kv_message
from branchline.wire.seals import Sealed, seal

TREE = DraftTree((4, 6), (0, 1), (-0.5, -1.0))


def span(
    part: KvPart = KvPart.TARGET,
    layers: tuple[int, int] = (0, LAYERS),
    heads: tuple[int, int] = (0, KV_HEADS),
    tokens: tuple[int, int] = (0, 4),
) -> KvSpan:
    return KvSpan(part, layers, heads, tokens)


def zeros(of: KvSpan) -> bytes:
    sizes = [end - start for start, end in (of.layers, of.heads, of.tokens)]
    return bytes(sizes[0] * sizes[1] * sizes[2] * 2 * HEAD_DIM * 4)


def header(lease_id: str, kv_dtype: str = "float32", stream: int = 0) -> decode_pb2.HandoffRequest:
    return sealed(decode_pb2.HandoffHeader(lease_id=lease_id, kv_dtype=kv_dtype, stream=stream))


def sealed(message: Sealed) -> decode_pb2.HandoffRequest:
    seal(message)
    parts = {"HandoffHeader": "header", "DraftFrame": "draft", "CommitFrame": "commit"}
    return decode_pb2.HandoffRequest(**{parts[type(message).__name__]: message})


def kv(index: int, of: KvSpan, data: bytes | None = None, sample: int = 0) -> decode_pb2.HandoffRequest:
    return decode_pb2.HandoffRequest.FromString(kv_bytes(index, of, data, sample).encoded)


def kv_bytes(index: int, of: KvSpan, data: bytes | None = None, sample: int = 0) -> KvMessage:
    """As a prefill worker makes it."""
    return kv_message(index, of, zeros(of) if data is None else data, sample)


def draft(
    index: int,
    first_token: int = 5,
    tree: DraftTree = TREE,
    sample: int = 0,
    logprobs: TokenLogprobs | None = None,
) -> decode_pb2.HandoffRequest:
    frame = tree_to_proto(tree, index=index, first_token=first_token, sample=sample, logprobs=logprobs)
    return decode_pb2.HandoffRequest(draft=frame)


def commit(messages: list[decode_pb2.HandoffRequest], **changes: int) -> decode_pb2.HandoffRequest:
    totals = decode_pb2.CommitFrame(frames=len(messages), kv_bytes=sum(len(message.kv.data) for message in messages))
    totals.MergeFrom(decode_pb2.CommitFrame(**changes))
    return sealed(totals)


def frames(context: int, with_draft: bool = True) -> list[decode_pb2.HandoffRequest]:
    """Every frame of a hand-off, the commit excepted."""
    halves = [span(tokens=(0, context), layers=(0, 3)), span(tokens=(0, context), layers=(3, LAYERS))]
    messages = [kv(index, half) for index, half in enumerate(halves)] + [draft(2)]
    if with_draft:
        messages.append(kv(3, span(KvPart.DRAFT, layers=(0, 1), tokens=(1, context + 1))))
    return messages


def row(index: int, context: int, sample: int) -> decode_pb2.HandoffRequest:
    """A sample's own draft row."""
    return kv(index, span(KvPart.DRAFT, layers=(0, 1), tokens=(context, context + 1)), sample=sample)


def sample_frames(context: int, samples: int) -> list[decode_pb2.HandoffRequest]:
    """Every frame of a hand-off for several samples; sample i's first token is 5 + i."""
    messages = frames(context)
    for sample in range(1, samples):
        messages.append(draft(len(messages), 5 + sample, sample=sample))
        messages.append(row(len(messages), context, sample))
    return messages


async def send(stub: Any, messages: list[decode_pb2.HandoffRequest]) -> decode_pb2.HandoffResponse:
    """Sends all and returns the last response. Raises AioRpcError."""
    call = stub.Handoff(timeout=20)
    last = None
    try:
        for message in messages:
            await call.write(message)
        await call.done_writing()
    except Exception:  # the receiver has ended the call; reading raises its status
        if not call.done():
            raise
    while (response := await call.read()) is not grpc.aio.EOF:
        last = response
    assert last is not None
    return last
