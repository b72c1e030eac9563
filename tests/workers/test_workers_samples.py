"""Samples of one request: they share the prompt's computation, its hand-off and its blocks, and nothing else."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest
from handoff_messages import commit, draft, frames, header, kv, row, sample_frames, send, span
from worker_driver import Driver, Outcome, Tiny, code_of, drain, running_workers, sample_of

from branchline.core import DraftTree, KvPart, Request, SamplingParams, TokenLogprobs
from branchline.v1 import decode_pb2, types_pb2

pytestmark = pytest.mark.wire

CONTEXT = 20
SAMPLED = SamplingParams(temperature=1.0, seed=11)
DRAFT = KvPart.DRAFT


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(80) for _ in range(length))


@pytest.fixture
def request_(workers: Driver) -> Request:
    return workers.request(prompt(CONTEXT), 8, sampling=SAMPLED)


@pytest.mark.parametrize("length", [1, 16, 32, 33, 47])
async def test_samples_are_those_of_separate_requests(workers: Driver, length: int) -> None:
    """Also where the prompt ends with a block of 16."""
    request = workers.request(prompt(length), 20, sampling=SAMPLED)
    together = await workers.complete_samples(request, 4)
    alone = await separately(workers, request, 4)
    assert [outcome.token_ids for outcome in together] == [outcome.token_ids for outcome in alone]
    assert len({tuple(outcome.token_ids) for outcome in together}) == 4
    # The same trees and draft rows were shipped, so the same drafts are accepted.
    assert [outcome.speculation for outcome in together] == [outcome.speculation for outcome in alone]
    assert sum(outcome.speculation.drafted for outcome in together) > 0
    _, status = await workers.status()
    assert status.cold_starts == 0


async def separately(workers: Driver, request: Request, samples: int) -> list[Outcome]:
    """The samples as requests of their own, one after the other."""
    return [await workers.complete(sample_of(request, number)) for number in range(samples)]


async def test_the_prompt_is_computed_and_held_once(workers: Driver) -> None:
    request = workers.request(prompt(160), 4, sampling=SAMPLED)
    lease = await workers.reserve(request)
    _, alone = await workers.status()
    await workers.abort(lease)
    lease = await workers.reserve(request, samples=4)
    _, together = await workers.status()
    assert len(lease.sibling_lease_ids) == together.leases - 1 == 3
    full = 160 // 16
    assert together.blocks_used == alone.blocks_used + 3 * (alone.blocks_used - full)
    await workers.abort(lease)
    before = (await workers.status())[0].prefilled_tokens
    await workers.complete_samples(request, 4)
    assert (await workers.status())[0].prefilled_tokens == before + 160


async def test_samples_go_on_behind_what_was_emitted_alone(workers: Driver) -> None:
    """A sample that was interrupted goes on as a request with its sample index."""
    request = workers.request(prompt(9), 16, sampling=SAMPLED)
    for number, outcome in enumerate(await workers.complete_samples(request, 3)):
        emitted = tuple(outcome.token_ids[:7])
        rest = workers.request(prompt(9), 16, sampling=sample_of(request, number).sampling, emitted=emitted)
        assert emitted + tuple((await workers.complete(rest)).token_ids) == tuple(outcome.token_ids)


async def test_a_sample_whose_first_token_ends_it_does_not_hold_the_others_up(workers: Driver) -> None:
    """Each sample in turn ends with its first token, sample 0 included."""
    sampling = SamplingParams(temperature=20.0, seed=3)
    unstopped = await workers.complete_samples(workers.request(prompt(9), 8, sampling=sampling), 4)
    firsts = [outcome.token_ids[0] for outcome in unstopped]
    assert len(set(firsts)) == 4
    for number, stop in enumerate(firsts):
        request = workers.request(prompt(9), 8, sampling=sampling, stop_token_ids=(stop,))
        outcomes = await workers.complete_samples(request, 4)
        assert outcomes[number].token_ids == [stop]
        assert outcomes[number].finish == types_pb2.FINISH_REASON_STOP
        for outcome, other in zip(outcomes, unstopped, strict=True):
            assert outcome.token_ids == up_to(other.token_ids, stop)


def up_to(token_ids: list[int], last: int) -> list[int]:
    return token_ids[: token_ids.index(last) + 1] if last in token_ids else token_ids


async def test_nothing_is_shipped_when_every_first_token_ends_its_sample(workers: Driver) -> None:
    outcomes = await workers.complete_samples(workers.request(prompt(9), 1, sampling=SAMPLED), 3)
    assert [(len(one.token_ids), one.finish) for one in outcomes] == [(1, types_pb2.FINISH_REASON_LENGTH)] * 3


async def test_log_probabilities_come_with_every_token(workers: Driver, tiny: Tiny) -> None:
    request = workers.request(prompt(12), 10, sampling=SAMPLED, logprobs=3)
    for outcome in await workers.complete_samples(request, 2):
        assert len(outcome.logprobs) == len(outcome.token_ids) == 10
        expected = tiny.logprobs(prompt(12), tuple(outcome.token_ids))
        for token_id, reported, exact in zip(outcome.token_ids, outcome.logprobs, expected, strict=True):
            assert reported.logprob == pytest.approx(float(exact[token_id]), abs=1e-3)
            assert list(reported.top_logprobs) == pytest.approx(exact.topk(3).values.tolist(), abs=1e-3)
    plain = await workers.complete(workers.request(prompt(12), 10, logprobs=0))
    assert [list(one.top_token_ids) for one in plain.logprobs] == [[]] * 10
    assert tuple(plain.token_ids) == tiny.greedy(prompt(12), 10)


async def test_a_handoff_without_the_log_probabilities_that_were_asked_for_ends_the_lease(workers: Driver) -> None:
    request = workers.request(prompt(CONTEXT), 8, logprobs=1)
    lease = await workers.reserve(request)
    stream = await workers.attach(lease.lease_id, request)
    messages = frames(CONTEXT)
    await send(workers.decode, [header(lease.lease_id), *messages, commit(messages)])
    assert await code_of(stream.read()) is grpc.StatusCode.ABORTED


async def test_without_drafting_no_tree_is_shipped_and_nothing_drafted(workers: Driver, tiny: Tiny) -> None:
    outcome = await workers.complete(workers.request(prompt(20), 16, draft_nodes=0))
    assert tuple(outcome.token_ids) == tiny.greedy(prompt(20), 16)
    assert outcome.speculation == types_pb2.Speculation(target_forwards=15)
    _, status = await workers.status()
    assert status.cold_starts == 0


async def test_samples_of_another_draft_head_start_cold(tiny: Tiny) -> None:
    async with running_workers(tiny.config(**{"model.draft": str(tiny.other_head)}), tiny.config()) as workers:
        request = workers.request(prompt(20), 16, sampling=SAMPLED)
        together = await workers.complete_samples(request, 2)
        alone = await separately(workers, request, 2)
        assert [outcome.token_ids for outcome in together] == [outcome.token_ids for outcome in alone]
        await workers.wait_until_idle()


async def test_samples_start_as_they_are_attached(workers: Driver, request_: Request) -> None:
    lease = await workers.reserve(request_, samples=3)
    first, second, third = lease.lease_id, *lease.sibling_lease_ids
    streams = [await workers.attach(first, request_), await workers.attach(second, sample_of(request_, 1))]
    messages = sample_frames(CONTEXT, 3)
    await send(workers.decode, [header(first), *messages, commit(messages)])
    assert [list((await stream.read()).tokens.token_ids) for stream in streams] == [[5], [6]]
    late = await workers.attach(third, sample_of(request_, 2))
    assert list((await late.read()).tokens.token_ids) == [7]
    for stream in (*streams, late):
        await drain(stream)
    await workers.wait_until_idle()


async def test_a_sample_that_nobody_attaches_to_expires(workers: Driver, request_: Request) -> None:
    lease = await workers.reserve(request_, samples=2)
    stream = await workers.attach(lease.lease_id, request_)
    messages = sample_frames(CONTEXT, 2)
    await send(workers.decode, [header(lease.lease_id), *messages, commit(messages)])
    await drain(stream)
    await workers.wait_until_idle(4.0)
    late = workers.attach(lease.sibling_lease_ids[0], sample_of(request_, 1))
    assert await code_of(late) is grpc.StatusCode.ABORTED


async def test_a_sample_that_ends_early_costs_the_others_nothing(workers: Driver, request_: Request) -> None:
    lease = await workers.reserve(request_, samples=3)
    streams = [
        await workers.attach(lease_id, sample_of(request_, number))
        for number, lease_id in enumerate([lease.lease_id, *lease.sibling_lease_ids])
    ]
    _, before = await workers.status()
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=lease.sibling_lease_ids[0]))
    assert await code_of(streams[1].read()) is grpc.StatusCode.ABORTED
    _, status = await workers.status()
    assert status.leases == 2
    assert 0 < status.blocks_used < before.blocks_used
    messages = sample_frames(CONTEXT, 3)
    await send(workers.decode, [header(lease.lease_id), *messages, commit(messages)])
    for number in (0, 2):
        assert list((await streams[number].read()).tokens.token_ids) == [5 + number]
        await drain(streams[number])


@pytest.mark.parametrize("frames_before", [0, 2, 5])
async def test_before_the_commit_sample_0_takes_the_others_along(
    workers: Driver, request_: Request, frames_before: int
) -> None:
    lease = await workers.reserve(request_, samples=2)
    sibling = await workers.attach(lease.sibling_lease_ids[0], sample_of(request_, 1))
    call = workers.decode.Handoff(timeout=20)
    for message in [header(lease.lease_id), *sample_frames(CONTEXT, 2)[:frames_before]]:
        await call.write(message)
        await call.read()
    await workers.decode.Abort(decode_pb2.AbortRequest(lease_id=lease.lease_id))
    assert await code_of(sibling.read()) is grpc.StatusCode.ABORTED
    assert await code_of(call.read()) is grpc.StatusCode.ABORTED
    await workers.wait_until_idle()


@pytest.mark.parametrize(
    "spoilt",
    [
        kv(0, span(), sample=1),
        kv(0, span(DRAFT, layers=(0, 1), tokens=(1, 2)), sample=1),
        kv(0, span(DRAFT, layers=(0, 1), tokens=(CONTEXT - 1, CONTEXT + 1)), sample=1),
        row(0, CONTEXT, sample=2),
        draft(0, sample=2),
        draft(0, logprobs=TokenLogprobs(-1.0, ((80, -1.0),))),
        draft(0, logprobs=TokenLogprobs(-1.0, tuple((token, -1.0) for token in range(21)))),
    ],
    ids=str,
)
async def test_what_a_sample_may_not_bring_is_refused(
    workers: Driver, request_: Request, spoilt: decode_pb2.HandoffRequest
) -> None:
    lease = await workers.reserve(request_, samples=2)
    assert await code_of(send(workers.decode, [header(lease.lease_id), spoilt])) is grpc.StatusCode.INVALID_ARGUMENT
    await workers.wait_until_idle()


async def test_each_sample_brings_one_draft_frame(workers: Driver, request_: Request) -> None:
    lease = await workers.reserve(request_, samples=2)
    twice = [draft(0, sample=1), draft(1, sample=1)]
    assert await code_of(send(workers.decode, [header(lease.lease_id), *twice])) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("left_out", "complaint"), [(3, "in front of row 20"), (4, "sample 1"), (5, "sample 1's draft row")], ids=str
)
async def test_a_commit_waits_for_every_sample(
    workers: Driver, request_: Request, left_out: int, complaint: str
) -> None:
    lease = await workers.reserve(request_, samples=2)
    builders = [
        lambda index: kv(index, span(tokens=(0, CONTEXT), layers=(0, 3))),
        lambda index: kv(index, span(tokens=(0, CONTEXT), layers=(3, 8))),
        draft,
        lambda index: kv(index, span(DRAFT, layers=(0, 1), tokens=(1, CONTEXT + 1))),
        lambda index: draft(index, sample=1),
        lambda index: row(index, CONTEXT, sample=1),
    ]
    del builders[left_out]
    messages = [build(index) for index, build in enumerate(builders)]
    with pytest.raises(grpc.aio.AioRpcError, match=complaint) as error:
        await send(workers.decode, [header(lease.lease_id), *messages, commit(messages)])
    assert error.value.code() is grpc.StatusCode.DATA_LOSS


async def test_a_sample_without_a_tree_needs_no_draft_row(workers: Driver, request_: Request) -> None:
    lease = await workers.reserve(request_, samples=2)
    stream = await workers.attach(lease.sibling_lease_ids[0], sample_of(request_, 1))
    messages = [*frames(CONTEXT), draft(4, tree=DraftTree(), sample=1)]
    await send(workers.decode, [header(lease.lease_id), *messages, commit(messages)])
    assert list((await stream.read()).tokens.token_ids) == [5]
    await drain(stream)
    await workers.abort(lease)


async def test_only_sample_0_takes_the_handoff(workers: Driver, request_: Request) -> None:
    lease = await workers.reserve(request_, samples=2)
    refused = send(workers.decode, [header(lease.sibling_lease_ids[0])])
    assert await code_of(refused) is grpc.StatusCode.INVALID_ARGUMENT
    await workers.abort(lease)


async def test_more_samples_than_can_be_are_refused(workers: Driver, tiny: Tiny) -> None:
    request = workers.request(prompt(4), 4)
    with pytest.raises(grpc.aio.AioRpcError, match="samples must be between 1 and 4, got 5") as error:
        await workers.reserve(request, samples=5)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with running_workers(tiny.config(**{"engine.max_batch": 64})) as large:
        with pytest.raises(grpc.aio.AioRpcError, match="samples must be between 1 and 16, got 17"):
            await large.reserve(request, samples=17)
    lease = decode_pb2.ReserveResponse(lease_id="some", sibling_lease_ids=["other"] * 16)
    with pytest.raises(grpc.aio.AioRpcError, match="samples must be at most 16, got 17") as error:
        await workers.start_prefill(request, lease).read()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_nothing_leaks_from_samples_with_a_third_cancelled(workers: Driver) -> None:
    generator = random.Random(6)
    slots = asyncio.Semaphore(3)

    async def one(number: int) -> None:
        request = workers.request(
            prompt(generator.randrange(1, 60), number), generator.randrange(1, 20), sampling=SAMPLED
        )
        samples = generator.randrange(1, 5)
        async with slots:
            task = asyncio.create_task(workers.complete_samples(request, samples, wait_ms=20_000))
            if number % 3 == 0:
                await asyncio.wait({task}, timeout=generator.random() * 0.1)
                task.cancel()
                await asyncio.wait({task})
                return
            for outcome in await task:
                assert len(outcome.token_ids) == request.max_tokens

    await asyncio.gather(*(one(number) for number in range(45)))
    await workers.wait_until_idle(1.0)
