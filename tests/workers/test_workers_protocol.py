"""The decode worker against hand-offs that break the protocol: the right status, and nothing left behind."""

from __future__ import annotations

import asyncio
import math

import grpc
import handoff_messages as wire
import pytest
from handoff_messages import commit, draft, frames, header, kv, sealed, send, span
from model_helpers import HEAD_DIM, KV_HEADS, LAYERS, VOCAB
from worker_driver import Driver, code_of, drain, eventually

from branchline.core import DraftTree, KvPart, Request
from branchline.v1 import decode_pb2
from branchline.wire.transfer import MAX_AHEAD, MAX_STREAMS

pytestmark = pytest.mark.wire

CONTEXT = 20
DRAFT = KvPart.DRAFT


@pytest.fixture
def request_(workers: Driver) -> Request:
    return workers.request(tuple(range(CONTEXT)), 8)


@pytest.fixture
async def lease_id(workers: Driver, request_: Request) -> str:
    return (await workers.reserve(request_)).lease_id


async def test_a_whole_handoff_is_ready_and_runs(workers: Driver, request_: Request, lease_id: str) -> None:
    stream = await workers.attach(lease_id, request_)
    messages = frames(CONTEXT)
    last = await send(workers.decode, [header(lease_id), *messages, commit(messages)])
    assert (last.next_index, last.ready) == (4, True)
    events = []
    while (event := await stream.read()) is not grpc.aio.EOF:
        events.append(event)
    assert (events[0].tokens.index, list(events[0].tokens.token_ids)) == (0, [5])
    tokens = [token for event in events for token in event.tokens.token_ids]
    assert len(tokens) == 8
    assert [event.tokens.index for event in events[:-1]] == [
        sum(len(earlier.tokens.token_ids) for earlier in events[:number]) for number in range(len(events) - 1)
    ]
    speculation = events[-2].tokens.speculation
    assert speculation.target_forwards == len(events) - 2
    _, status = await workers.status()
    assert status.speculation == speculation
    assert status.emitted_tokens == 8
    assert status.cold_starts == 0


@pytest.mark.parametrize(
    "spoilt",
    [
        kv(0, span(tokens=(0, CONTEXT + 1))),
        kv(0, span(tokens=(CONTEXT, CONTEXT + 1))),
        kv(0, span(layers=(0, LAYERS + 1))),
        kv(0, span(heads=(0, KV_HEADS + 1))),
        kv(0, span(DRAFT, layers=(0, 1), tokens=(0, 2))),
        kv(0, span(DRAFT, layers=(0, 1), tokens=(1, CONTEXT + 2))),
        kv(0, span(DRAFT, layers=(1, 2), tokens=(1, 2))),
        kv(0, span(), data=b"too short"),
        kv(MAX_AHEAD, span()),
        draft(0, first_token=VOCAB),
        draft(0, tree=DraftTree((VOCAB,), (0,), (-1.0,))),
        draft(0, tree=DraftTree((1,), (0,), (math.nan,))),
        sealed(decode_pb2.DraftFrame(tree_tokens=[1], tree_parents=[3], tree_scores=[0.0])),
        header("another lease"),
    ],
    ids=str,
)
async def test_what_was_not_promised_is_refused_and_ends_the_lease(
    workers: Driver, request_: Request, lease_id: str, spoilt: decode_pb2.HandoffRequest
) -> None:
    stream = await workers.attach(lease_id, request_)
    assert await code_of(send(workers.decode, [header(lease_id), spoilt])) is grpc.StatusCode.INVALID_ARGUMENT
    assert await code_of(stream.read()) is grpc.StatusCode.ABORTED


async def test_a_damaged_frame_may_be_sent_again(workers: Driver, request_: Request, lease_id: str) -> None:
    stream = await workers.attach(lease_id, request_)
    messages = frames(CONTEXT)
    damaged = decode_pb2.HandoffRequest()
    damaged.CopyFrom(messages[1])
    damaged.kv.data = b"\1" + damaged.kv.data[1:]
    call = workers.decode.Handoff(timeout=20)
    for message in [header(lease_id), messages[0], damaged, *messages[2:], commit(messages)]:
        await call.write(message)
    while not (response := await call.read()).resend:
        assert not response.ready
        assert response.next_index <= 1
    assert list(response.resend) == [1]
    await call.write(messages[1])
    while not (response := await call.read()).ready:
        assert not response.resend
    assert response.next_index == len(messages)
    assert (await stream.read()).tokens.token_ids == [5]
    stream.cancel()


async def test_a_frame_that_comes_twice_is_ignored(workers: Driver, request_: Request, lease_id: str) -> None:
    messages = frames(CONTEXT)
    twice = [message for message in messages for _ in range(2)]
    last = await send(workers.decode, [header(lease_id), *twice, *messages, commit(messages)])
    assert (last.next_index, last.ready) == (len(messages), True)
    # Its answer lost, the commit is repeated on a new stream.
    again = await send(workers.decode, [header(lease_id), commit(messages)])
    assert (again.next_index, again.ready) == (len(messages), True)
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=lease_id))
    assert request_.max_tokens == 8


async def test_a_message_that_cannot_be_read_breaks_the_stream_and_no_more(workers: Driver, lease_id: str) -> None:
    messages = frames(CONTEXT)
    broken_header = header(lease_id)
    broken_header.header.stream ^= 1
    broken_commit = commit(messages)
    broken_commit.commit.frames ^= 1
    nothing = decode_pb2.HandoffRequest()
    for spoilt in ([nothing], [broken_header], *([header(lease_id), one] for one in (nothing, broken_commit))):
        assert await code_of(send(workers.decode, spoilt)) is grpc.StatusCode.DATA_LOSS
    assert (await send(workers.decode, [header(lease_id), *messages, commit(messages)])).ready
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=lease_id))


@pytest.mark.parametrize("changes", [{"frames": 3}, {"kv_bytes": 1}], ids=str)
async def test_wrong_totals_are_a_loss(
    workers: Driver, request_: Request, lease_id: str, changes: dict[str, int]
) -> None:
    stream = await workers.attach(lease_id, request_)
    messages = [header(lease_id), *frames(CONTEXT), commit(frames(CONTEXT), **changes)]
    assert await code_of(send(workers.decode, messages)) is grpc.StatusCode.DATA_LOSS
    assert await code_of(stream.read()) is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("left_out", [0, 1, 2])
async def test_a_handoff_with_a_hole_is_a_loss(workers: Driver, lease_id: str, left_out: int) -> None:
    messages = frames(CONTEXT)
    del messages[left_out]
    renumbered = []
    for index, message in enumerate(messages):
        if message.WhichOneof("part") == "draft":
            renumbered.append(draft(index))
        else:
            part = DRAFT if message.kv.part == decode_pb2.KV_PART_DRAFT else KvPart.TARGET
            of = span(part, (message.kv.layer_start, message.kv.layer_end), (0, KV_HEADS),
                      (message.kv.token_start, message.kv.token_end))  # fmt: skip
            renumbered.append(kv(index, of))
    sending = send(workers.decode, [header(lease_id), *renumbered, commit(renumbered)])
    assert await code_of(sending) is grpc.StatusCode.DATA_LOSS


async def test_only_a_header_of_this_worker_opens_a_handoff(workers: Driver, lease_id: str) -> None:
    failed = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION
    assert await code_of(send(workers.decode, [kv(0, span())])) is failed[0]
    assert await code_of(send(workers.decode, [])) is failed[0]
    assert await code_of(send(workers.decode, [header(lease_id, stream=MAX_STREAMS)])) is failed[0]
    assert await code_of(send(workers.decode, [header("unknown")])) is failed[1]
    assert await code_of(send(workers.decode, [header(lease_id, kv_dtype="bfloat16")])) is failed[2]
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=lease_id))


async def test_a_new_handoff_stream_takes_its_numbers_place(workers: Driver, lease_id: str) -> None:
    messages = frames(CONTEXT)
    old = workers.decode.Handoff(timeout=20)
    await old.write(header(lease_id))
    await old.write(messages[0])
    assert (await old.read()).next_index == 0
    assert (await old.read()).next_index == 1
    other = workers.decode.Handoff(timeout=20)
    await other.write(header(lease_id, stream=1))
    assert (await other.read()).next_index == 1
    last = await send(workers.decode, [header(lease_id), *messages[1:], commit(messages)])
    assert last.ready
    assert await code_of(old.read()) is grpc.StatusCode.ABORTED
    while not (await other.read()).ready:
        pass
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=lease_id))


async def test_leases_are_attached_once_and_to_their_own_request(
    workers: Driver, request_: Request, lease_id: str
) -> None:
    stream = await workers.attach(lease_id, request_)
    assert await code_of(workers.attach(lease_id, request_)) is grpc.StatusCode.ALREADY_EXISTS
    assert await code_of(workers.attach("unknown", request_)) is grpc.StatusCode.NOT_FOUND
    stream.cancel()
    other = (await workers.reserve(request_)).lease_id
    for wrong in (workers.request(tuple(range(CONTEXT + 1)), 7), workers.request(tuple(range(CONTEXT)), 9)):
        assert await code_of(workers.attach(other, wrong)) is grpc.StatusCode.INVALID_ARGUMENT
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=other))


@pytest.mark.parametrize("state", ["reserved", "receiving", "ready", "running"])
async def test_abort_is_legal_in_every_state(workers: Driver, request_: Request, lease_id: str, state: str) -> None:
    messages = frames(CONTEXT)
    call = stream = None
    if state == "receiving":
        call = workers.decode.Handoff(timeout=20)
        await call.write(header(lease_id))
        await call.read()
        await call.write(messages[0])
    if state == "running":
        stream = await workers.attach(lease_id, request_)
    if state in ("ready", "running"):
        await send(workers.decode, [header(lease_id), *messages, commit(messages)])
    for _ in range(2):
        await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=lease_id, reason="a test"))
    await workers.wait_until_idle()
    if call is not None:
        assert await code_of(drain(call)) is grpc.StatusCode.ABORTED
        assert "a test" in await call.details()
    if stream is None:
        assert await code_of(workers.attach(lease_id, request_)) is grpc.StatusCode.ABORTED
    else:
        stream.cancel()


async def test_a_stalled_handoff_costs_the_lease(workers: Driver, request_: Request, lease_id: str) -> None:
    stream = await workers.attach(lease_id, request_)
    call = workers.decode.Handoff(timeout=20)
    await call.write(header(lease_id))
    await call.read()
    for _ in range(3):  # heartbeats keep it alive beyond its time to live of two seconds
        await asyncio.sleep(1.0)
        await call.write(header(lease_id))
    _, status = await workers.status()
    assert status.leases == 1
    assert await code_of(stream.read()) is grpc.StatusCode.ABORTED
    assert await code_of(drain(call)) is grpc.StatusCode.ABORTED


async def test_a_lease_that_nobody_uses_expires(workers: Driver, request_: Request, lease_id: str) -> None:
    messages = frames(CONTEXT)
    ready = (await workers.reserve(request_)).lease_id
    await send(workers.decode, [header(ready), *messages, commit(messages)])
    _, status = await workers.status()
    assert (status.leases, status.running) == (2, 0)
    assert status.blocks_used > 0

    async def gone() -> bool:
        return (await workers.status())[1].blocks_used == 0

    await eventually(gone, 4.0, lambda: "leases outlive their time")
    assert await code_of(workers.attach(lease_id, request_)) is grpc.StatusCode.ABORTED


async def test_reservations_that_cannot_be_kept_are_refused(workers: Driver, request_: Request) -> None:
    too_long = workers.request((1,) * 600, 8)
    assert await code_of(workers.reserve(too_long)) is grpc.StatusCode.INVALID_ARGUMENT
    for changes in ({"context_length": 1000}, {"request_id": ""}):
        if changes.get("request_id") == "":
            wrong = workers.decode.Reserve(decode_pb2.ReserveRequest(context_length=1, max_length=2, attempt=1))
            assert await code_of(wrong) is grpc.StatusCode.INVALID_ARGUMENT
        else:
            assert await code_of(workers.reserve(request_, **changes)) is grpc.StatusCode.INVALID_ARGUMENT
    leases = [await workers.reserve(request_) for _ in range(4)]  # one for each slot of the batch
    assert await code_of(workers.reserve(request_)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=leases[0].lease_id))
    leases.append(await workers.reserve(request_))
    for lease in leases:
        await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=lease.lease_id))


async def test_a_later_attempt_takes_over_and_an_earlier_one_is_refused(workers: Driver, request_: Request) -> None:
    first = await workers.reserve(request_)
    stream = await workers.attach(first.lease_id, request_)
    second = await workers.reserve(request_, attempt=2)
    assert await code_of(stream.read()) is grpc.StatusCode.ABORTED
    assert await code_of(workers.reserve(request_)) is grpc.StatusCode.ABORTED
    assert await code_of(send(workers.decode, [header(first.lease_id)])) is grpc.StatusCode.ABORTED
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=second.lease_id))


def test_the_hand_made_frames_fit_the_model() -> None:
    assert len(wire.zeros(span(tokens=(0, 1)))) == LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
