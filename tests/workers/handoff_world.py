"""A decode worker's receiving side without its server, and hand-offs to it over a fake transport."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import torch
from fake_transport import FakeTransport
from handoff_messages import draft, kv_bytes, span
from model_helpers import HEAD_DIM, KV_HEADS, LAYERS, VOCAB

from branchline.config import Config
from branchline.core import KvPart, KvSpan
from branchline.engine.assemble import assemble
from branchline.engine.decode import DecodeRunner
from branchline.engine.hosting import hosted_engine
from branchline.v1 import decode_pb2
from branchline.wire.frames import read_kv_frame
from branchline.wire.kv_codec import Incoming, KvMessage, Outgoing, parse_request
from decode_worker.engine_loop import DecodeLoop
from decode_worker.handoff import receive_handoff
from decode_worker.leases import Lease, LeaseTable
from decode_worker.reservations import Ask
from decode_worker.sessions import Sessions
from prefill_worker.handoff import HandoffSender, HandoffTotals

TTL_S = 0.5
#: Tokens of a text, and one more.
LONGEST = 64


@dataclass
class World:
    """The decode worker."""

    sessions: Sessions
    numbers: itertools.count = field(default_factory=itertools.count)

    async def lease(self, context: int, **changes) -> Lease:
        """`text`: which text of `random_frames` the context is the beginning of, to find it again and to be found."""
        if (text := changes.pop("text", None)) is not None:
            changes["context"] = tuple((text + 7 * index) % VOCAB for index in range(context))
        ask = Ask(f"request {next(self.numbers)}", 1, context, context + 8, accepts_draft=True, **changes)
        [lease, *_] = await self.sessions.reserve(ask, wait_s=20.0)
        return lease

    def receive(self, requests: AsyncIterator[Incoming]):
        return receive_handoff(self.sessions, requests)

    def ready(self, lease: Lease) -> bool:
        return lease.state.value == "ready"

    async def kv_is(self, lease: Lease, sent: list[Outgoing]) -> bool:
        """Whether the cache holds what was sent."""
        engine = self.sessions.engine

        def compare() -> bool:
            blocks = engine._allocations[lease.lease_id].blocks
            spans = [read_kv_frame(parse_request(one.encoded)) for one in sent if isinstance(one, KvMessage)]
            return all(engine.runner.caches.read(blocks, of) == data for of, data in spans)

        return await self.sessions.thread.submit(compare)

    async def idle(self) -> bool:
        """Nothing is in use: no lease, no block, no stream."""
        await self.sessions.thread.submit(lambda: None)  # behind the releases
        return len(self.sessions.table) == len(self.sessions.waiting) == self.sessions.engine.runner.pool.used == 0


@contextlib.asynccontextmanager
async def receiving(config: Config, ttl_s: float = TTL_S) -> AsyncIterator[World]:
    def build() -> DecodeLoop:
        models, tree = assemble(config, lambda _: None)
        return DecodeLoop(models, tree, DecodeRunner(models, config.engine, tree))

    async with hosted_engine("decode-engine", build, asyncio.Event()) as host:
        assert host is not None
        sessions = Sessions(host.thread, host.engine, LeaseTable("test", ttl_s))
        try:
            yield World(sessions)
        finally:
            sessions.close("the test is over")


def random_frames(context: int, pieces: int, text: int, held: int = 0) -> list[Outgoing]:
    """A whole hand-off with random KV, the same for all contexts of a text; the target's in `pieces` frames by tokens.
    The first `held` tokens' is left out."""
    generator = torch.Generator().manual_seed(text)
    rows = torch.randint(256, (LAYERS + 1, 2, LONGEST, KV_HEADS, 4 * HEAD_DIM), generator=generator).to(torch.uint8)

    def data(of: KvSpan) -> bytes:
        part = rows[:LAYERS] if of.part is KvPart.TARGET else rows[LAYERS:]
        return part[of.layers[0] : of.layers[1], :, of.tokens[0] : of.tokens[1]].numpy().tobytes()

    messages: list[Outgoing] = []
    size = -(-(context - held) // pieces)
    for start in range(held, context, size):
        of = span(tokens=(start, min(context, start + size)), layers=(0, LAYERS))
        messages.append(kv_bytes(len(messages), of, data(of)))
    messages.append(draft(len(messages)))
    row = span(KvPart.DRAFT, layers=(0, 1), tokens=(max(1, held), context + 1))
    messages.append(kv_bytes(len(messages), row, data(row)))
    return messages


def sender(transport: FakeTransport, lease: Lease, messages: list[Outgoing], stall_s: float = TTL_S) -> HandoffSender:
    header = decode_pb2.HandoffHeader(lease_id=lease.lease_id, kv_dtype="float32")

    async def computed() -> AsyncGenerator[Outgoing]:
        for message in messages:
            yield message

    return HandoffSender(transport, "fake", header, computed(), stall_s)


async def ship(transport: FakeTransport, lease: Lease, messages: list[Outgoing]) -> HandoffTotals:
    """Raises RpcFailure."""
    return await sender(transport, lease, messages).run()
