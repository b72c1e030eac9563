"""What a hand-off has to send: a random walk over streams, breaks and acknowledgements."""

from __future__ import annotations

import asyncio
import random

import pytest
from handoff_messages import draft, kv_bytes, span

from branchline.v1 import decode_pb2
from branchline.wire.kv_codec import KvMessage, Outgoing
from prefill_worker.outbox import WINDOW_BYTES, HandoffTotals, Outbox

STREAMS, FRAMES = 3, 12


def number(message: Outgoing) -> int:
    return message.index if isinstance(message, KvMessage) else message.draft.index


def is_commit(message: Outgoing) -> bool:
    return not isinstance(message, KvMessage) and message.WhichOneof("part") == "commit"


@pytest.mark.parametrize("seed", range(50))
async def test_every_frame_arrives_however_streams_break(seed: int) -> None:
    """The receiver keeps what comes, acknowledges at times, and asks for some frames again."""
    generator, outbox = random.Random(seed), Outbox()
    came: set[int] = set()
    committed = False
    put = 0
    for _ in range(100_000):
        match generator.randrange(6):
            case 0 if put < FRAMES:
                outbox.put(kv_bytes(put, span()) if put < FRAMES - 1 else draft(put))
                put += 1
                if put == FRAMES:
                    outbox.finish()
            case 1 | 2:
                stream = generator.randrange(STREAMS)
                message = outbox.take(stream)
                arrives = generator.random() < 0.7
                if message is not None and is_commit(message):
                    assert message.commit.frames == FRAMES
                    committed = committed or arrives
                    if not arrives:
                        outbox.give_back(stream)
                elif message is not None and arrives:
                    came.add(number(message))
                elif message is not None and generator.random() < 0.5:
                    outbox.acknowledge(decode_pb2.HandoffResponse(resend=[number(message)]))
                elif message is not None:
                    outbox.give_back(stream)
            case 3:
                outbox.give_back(generator.randrange(STREAMS))
            case 4:
                lowest = min(set(range(FRAMES + 1)) - came)
                outbox.acknowledge(decode_pb2.HandoffResponse(next_index=lowest, resend=[99]))
                assert outbox.acknowledged == lowest
            case _ if committed and len(came) == FRAMES:
                break
    else:
        raise AssertionError(f"still not there: {came}")
    outbox.acknowledge(decode_pb2.HandoffResponse(next_index=FRAMES, ready=True))
    assert outbox.ready
    assert outbox.take(0) is None or committed
    assert outbox.has_room
    assert outbox.totals.frames == FRAMES


async def test_the_window_closes_and_opens_with_bytes() -> None:
    outbox = Outbox()
    quarter = b"x" * (WINDOW_BYTES // 4)
    for index in range(4):
        assert outbox.has_room
        outbox.put(kv_bytes(index, span(), quarter))
    assert not outbox.has_room
    assert outbox.backlog == 4
    outbox.take(0)
    outbox.acknowledge(decode_pb2.HandoffResponse(next_index=1))
    assert outbox.has_room
    assert outbox.totals == HandoffTotals(4, WINDOW_BYTES, 0)


async def test_what_changes_wakes_whoever_waits() -> None:
    outbox = Outbox()
    for change in (lambda: outbox.put(draft(0)), outbox.finish, lambda: outbox.give_back(0)):
        waiting = outbox.changed.next
        assert not waiting.done()
        change()
        await asyncio.wait_for(waiting, 1.0)
