"""KV that the decode worker still has: it is not shipped again, and what comes out is what a cold pair gives."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest
from handoff_messages import commit, draft, header, kv, send, span
from model_helpers import HEAD_DIM, KV_HEADS, LAYERS
from worker_driver import Driver, Tiny, code_of, running_workers

from branchline.core import KvPart, Request
from branchline.v1 import decode_pb2

pytestmark = pytest.mark.wire

BLOCK = 16
#: Bytes of a token's KV in one layer.
ROW = 2 * KV_HEADS * HEAD_DIM * 4


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(80) for _ in range(length))


def whole(tokens: int) -> int:
    """Tokens of them that whole blocks hold."""
    return tokens // BLOCK * BLOCK


async def reserve(workers: Driver, request: Request) -> decode_pb2.ReserveResponse:
    """As the gateway does it."""
    return await workers.reserve(request, context=request.context)


async def shipped(workers: Driver, request: Request, text: list[int]) -> int:
    """Runs a request, which must give `text`; the bytes of KV that its hand-off took."""
    lease = await reserve(workers, request)
    stream = await workers.attach(lease.lease_id, request)
    events = [event async for event in workers.start_prefill(request, lease)]
    tokens: list[int] = []
    while (event := await stream.read()) is not grpc.aio.EOF:
        tokens += event.tokens.token_ids
    assert tokens == text
    return events[-1].handed_off.kv_bytes


async def reused(workers: Driver) -> int:
    return (await workers.status())[1].reused_tokens


@pytest.mark.parametrize("sizes", [(BLOCK, BLOCK), (8, 32), (32, 8)], ids=str)
async def test_a_second_turn_ships_only_what_is_new(tiny: Tiny, sizes: tuple[int, int]) -> None:
    """The answer's KV is there as well, all but its last token's; in blocks of the decode worker's own size."""
    configs = [tiny.config(**{"engine.block_size": size}) for size in sizes]
    async with running_workers(*configs) as workers:
        context: tuple[int, ...] = ()
        held = in_all = 0
        for turn in range(3):
            context = (*context, *prompt(40 - 9 * turn, turn))
            text = list(tiny.greedy(context, 23))
            kv_bytes = await shipped(workers, workers.request(context, 23), text)
            assert kv_bytes == ((len(context) - held) * LAYERS + len(context) + 1 - max(1, held)) * ROW
            in_all += held
            assert await reused(workers) == in_all
            context = (*context, *text)
            held = (len(context) - 1) // sizes[1] * sizes[1]
        await workers.wait_until_idle()  # what is only kept counts as free


async def test_the_same_prompt_again_ships_its_end(workers: Driver, tiny: Tiny) -> None:
    """One token at least, though all of it is there: the lease's promise is never empty."""
    context = prompt(3 * BLOCK)
    text = list(tiny.greedy(context, 20))
    for held in (0, 2 * BLOCK):
        expected = ((len(context) - held) * LAYERS + len(context) + 1 - max(1, held)) * ROW
        assert await shipped(workers, workers.request(context, 20), text) == expected


async def test_samples_share_what_is_held(workers: Driver, tiny: Tiny) -> None:
    context = prompt(50)
    text = list(tiny.greedy(context, 12))
    await workers.complete(workers.request(context, 12))
    outcomes = await workers.complete_samples(workers.request(context, 12), 3)
    assert [outcome.token_ids for outcome in outcomes] == [text] * 3
    assert await reused(workers) == whole(50)


async def test_many_at_once_with_one_beginning(workers: Driver, tiny: Tiny) -> None:
    """They are reserved before any of it is there, so each is shipped whole; one copy is kept."""
    system = prompt(64)
    requests = [workers.request((*system, *prompt(9, seed)), 16) for seed in range(8)]
    outcomes = await asyncio.gather(*map(workers.complete, requests[:4]))
    assert await reused(workers) == 0
    outcomes += await asyncio.gather(*map(workers.complete, requests[4:]))
    assert await reused(workers) == 4 * 64
    assert [tuple(one.token_ids) for one in outcomes] == [tiny.greedy(one.prompt, 16) for one in requests]


async def test_a_request_that_goes_on_elsewhere_or_here_finds_its_own(workers: Driver, tiny: Tiny) -> None:
    """Aborted in mid-stream and tried again, as after a preemption: prompt and emitted tokens are the context."""
    context = prompt(30)
    request = workers.request(context, 60)
    lease = await reserve(workers, request)
    stream = await workers.attach(lease.lease_id, request)
    async for _ in workers.start_prefill(request, lease):
        pass
    emitted: list[int] = []
    while len(emitted) < 20:
        emitted += (await stream.read()).tokens.token_ids
    stream.cancel()
    await workers.wait_until_idle()
    again = workers.request(context, 60, emitted=tuple(emitted))
    outcome = await workers.complete(again)
    assert (*emitted, *outcome.token_ids) == tiny.greedy(context, 60)
    # As much as was emitted when it was aborted, which may be more than what has been read of it.
    assert await reused(workers) >= whole(30 + len(emitted) - 1)


async def test_a_cold_drafter_leaves_nothing_and_may_take(tiny: Tiny) -> None:
    context = prompt(40)
    async with running_workers(tiny.config(**{"model.draft": str(tiny.other_head)}), tiny.config()) as workers:
        for _ in range(2):
            outcome = await workers.complete(workers.request(context, 16))
            assert tuple(outcome.token_ids) == tiny.greedy(context, 16)
            assert await reused(workers) == 0


@pytest.mark.parametrize("role", ["both", "decode", "prefill"])
async def test_prefix_caching_can_be_switched_off_on_either_side(tiny: Tiny, role: str) -> None:
    off, on = tiny.config(**{"engine.prefix_caching": False}), tiny.config()
    context = prompt(40)
    async with running_workers(on if role == "decode" else off, on if role == "prefill" else off) as workers:
        for _ in range(2):
            outcome = await workers.complete(workers.request(context, 16))
            assert tuple(outcome.token_ids) == tiny.greedy(context, 16)
        assert await reused(workers) == (whole(40) if role == "prefill" else 0)


async def test_frames_of_what_is_held_are_refused(workers: Driver) -> None:
    """Others read there. What is promised begins with the first token that isn't held, also for the totals."""
    context = prompt(2 * BLOCK + 4)
    request = workers.request(context, 8)
    await workers.complete(request)
    for part, start in ((KvPart.TARGET, 2 * BLOCK - 1), (KvPart.TARGET, 0), (KvPart.DRAFT, 2 * BLOCK - 1)):
        lease = await reserve(workers, request)
        assert lease.held_tokens == 2 * BLOCK
        layers = (0, 1) if part is KvPart.DRAFT else (0, LAYERS)
        wrong = kv(0, span(part, layers=layers, tokens=(start, len(context))))
        assert await code_of(send(workers.decode, [header(lease.lease_id), wrong])) is grpc.StatusCode.INVALID_ARGUMENT
    lease = await reserve(workers, request)
    right = [
        kv(0, span(tokens=(2 * BLOCK, len(context)), layers=(0, LAYERS))),
        draft(1),
        kv(2, span(KvPart.DRAFT, layers=(0, 1), tokens=(2 * BLOCK, len(context) + 1))),
    ]
    for hole in (0, 2):
        missing = [one for one in right if one is not right[hole]]
        other = await reserve(workers, request)
        sending = send(workers.decode, [header(other.lease_id), *renumbered(missing), commit(missing)])
        if hole == 0:
            assert await code_of(sending) is grpc.StatusCode.DATA_LOSS
        else:  # draft KV may be left out altogether
            assert (await sending).ready
            await workers.abort(other)
    assert (await send(workers.decode, [header(lease.lease_id), *right, commit(right)])).ready
    await workers.abort(lease)


async def test_a_context_that_is_not_the_promised_one_is_refused(workers: Driver) -> None:
    """At Reserve, when the numbers differ, and at Attach: the KV that is held would be another text's."""
    context = prompt(40)
    request = workers.request(context, 8)
    assert await code_of(workers.reserve(request, context=(1,))) is grpc.StatusCode.INVALID_ARGUMENT
    lease = await reserve(workers, request)
    other = workers.request((*context[:-1], (context[-1] + 1) % 80), 8)
    assert await code_of(workers.attach(lease.lease_id, other)) is grpc.StatusCode.INVALID_ARGUMENT
    await workers.abort(lease)
    wrong = decode_pb2.ReserveResponse(lease_id="any", held_tokens=40)
    assert await code_of(workers.start_prefill(request, wrong)) is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_a_lease_holds_survives_whatever_comes_between(tiny: Tiny) -> None:
    """Between Reserve and the hand-off others fill the cache many times over."""
    async with running_workers(tiny.config(**{"engine.kv_cache_mib": 1, "engine.max_model_len": 128})) as workers:
        context = prompt(60)
        await workers.complete(workers.request(context, 16))
        request = workers.request(context, 16)
        lease = await reserve(workers, request)
        assert lease.held_tokens == whole(60)
        stream = await workers.attach(lease.lease_id, request)
        for seed in range(14):
            await workers.complete(workers.request(prompt(110, seed + 1), 2))
        fresh = await reserve(workers, workers.request(prompt(110, 1), 16))
        assert fresh.held_tokens == 0, "nothing was evicted: nothing was tested"
        await workers.abort(fresh)
        async for _ in workers.start_prefill(request, lease):
            pass
        tokens: list[int] = []
        while (event := await stream.read()) is not grpc.aio.EOF:
            tokens += event.tokens.token_ids
        assert tuple(tokens) == tiny.greedy(context, 16)
        await workers.wait_until_idle()


def renumbered(messages: list[decode_pb2.HandoffRequest]) -> list[decode_pb2.HandoffRequest]:
    """The same frames, numbered without gaps."""
    again = []
    for index, message in enumerate(messages):
        if message.WhichOneof("part") == "draft":
            again.append(draft(index))
        else:
            part = KvPart.DRAFT if message.kv.part == decode_pb2.KV_PART_DRAFT else KvPart.TARGET
            frame = message.kv
            of = span(part, (frame.layer_start, frame.layer_end), tokens=(frame.token_start, frame.token_end))
            again.append(kv(index, of))
    return again
