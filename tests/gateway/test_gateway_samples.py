"""Several samples of one request: computed together, streamed side by side, recovered one by one."""

from __future__ import annotations

import asyncio
import itertools

import grpc
import pytest
from gateway_harness import PROMPT, House, house
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually, expected_tokens, logprobs_at

from branchline.v1 import types_pb2
from branchline.wire.status import RpcFailure
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

Code = grpc.StatusCode


def failure(code: grpc.StatusCode) -> RpcFailure:
    return RpcFailure(code, "scripted")


def starts(h: House) -> list[tuple[int, int, int]]:
    """What prefill workers were asked for: the first sample's number, how many samples, tokens emitted before."""
    calls = ((p.requests, p.samples) for p in h.prefills)
    return [
        (request.sampling.sample_index, samples, len(request.emitted))
        for requests, numbers in calls
        for request, samples in zip(requests, numbers, strict=True)
    ]


async def test_samples_share_one_prefill(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        answers = await h.complete_all(4, 6, seed=7, temperature=0.5)
        assert {answer.finished.seed for answer in answers} == {7}
        assert [answer.finished.speculation.target_forwards for answer in answers] == [5] * 4
        assert starts(h) == [(0, 4, 0)]
        (reservation,) = h.decodes[0].reservations
        assert reservation.samples == 4
        attached = h.decodes[0].requests
        assert [request.sampling.sample_index for request in attached] == [0, 1, 2, 3]
        assert {(request.sampling.seed, tuple(request.prompt)) for request in attached} == {(7, PROMPT)}
        assert len({request.request_id for request in attached}) == 4
        await h.idle()
        assert h.decodes[0].aborts == []


async def test_responses_are_interleaved(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(pace_s=0.01)]) as h:
        order = [response.sample async for response in h.call(10, n=3)]
        assert set(order) == {0, 1, 2}
        changes = sum(before != after for before, after in itertools.pairwise(order))
        assert changes > 10
        await h.idle()


async def test_the_fast_need_not_wait_for_the_slow(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(sample_pace_s=0.01)]) as h:
        ends = [response.sample async for response in h.call(8, n=3) if response.HasField("finished")]
        assert ends == [0, 1, 2]
        await h.idle()


async def test_stop_strings_end_samples_at_different_times(tokens: Tokens) -> None:
    texts = [tokens.decode(expected_tokens(PROMPT, 20, sample)) for sample in range(3)]
    stops = [texts[0][2:5], texts[1][9:12]]
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(pace_s=0.005)]) as h:
        answers = await h.answers(20, n=3, stop=stops)
        for text, answer in zip(texts, answers, strict=True):
            ends = [text.find(stop) for stop in stops if stop in text]
            assert answer.text == (text[: min(ends)] if ends else text)
            expected = types_pb2.FINISH_REASON_STOP if ends else types_pb2.FINISH_REASON_LENGTH
            assert answer.finished.finish_reason == expected
        counts = [answer.finished.usage.completion_tokens for answer in answers]
        assert counts[0] < counts[1]
        await h.idle()
        stopped = [count < 20 for count in counts]
        assert len(h.decodes[0].aborts) == sum(stopped)


async def test_a_stop_string_in_the_first_token_leaves_the_others_alone(tokens: Tokens) -> None:
    """The first sample's lease takes the hand-off of all: it may not be given back before that is over."""
    first = tokens.decode(expected_tokens(PROMPT, 1))
    others = [tokens.decode(expected_tokens(PROMPT, 4, sample)) for sample in (1, 2)]
    assert all(first not in text for text in others)
    async with house(tokens, [ScriptedPrefill(slow_s=0.05)], [ScriptedDecode(pace_s=0.01)]) as h:
        answers = await h.answers(4, n=3, stop=[first])
        assert [answer.finished.usage.completion_tokens for answer in answers] == [1, 4, 4]
        assert [answer.text for answer in answers[1:]] == others
        assert starts(h) == [(0, 3, 0)]
        assert [answer.finished.failovers for answer in answers] == [0, 0, 0]
        await h.idle()
        assert h.decodes[0].aborts == ["d1-1"]


@pytest.mark.parametrize("ending", [(0,), (1,), (0, 2), (0, 1, 2)])
async def test_first_tokens_that_end_samples(tokens: Tokens, ending: tuple[int, ...]) -> None:
    prefill, decode = ScriptedPrefill(finish_samples=ending), ScriptedDecode(finish_samples=ending)
    async with house(tokens, [prefill], [decode]) as h:
        answers = await h.answers(6, n=3)
        for sample, answer in enumerate(answers):
            assert answer.token_ids == expected_tokens(PROMPT, 1 if sample in ending else 6, sample)
            stopped = answer.finished.finish_reason == types_pb2.FINISH_REASON_STOP
            assert stopped == (sample in ending)
        assert starts(h) == [(0, 3, 0)]
        await h.idle()


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.ABORTED, Code.INTERNAL])
@pytest.mark.parametrize("sample", [0, 2])
async def test_a_sample_whose_stream_breaks_goes_on_alone(tokens: Tokens, code: grpc.StatusCode, sample: int) -> None:
    decodes = [ScriptedDecode(failing=1, failing_sample=sample, failure=failure(code), pace_s=0.005)]
    async with house(tokens, [ScriptedPrefill()], decodes) as h:
        answers = await h.complete_all(3, 12)
        assert [answer.finished.failovers for answer in answers] == [int(index == sample) for index in range(3)]
        assert starts(h) == [(0, 3, 0), (sample, 1, 3)]
        await h.idle()
        ids = [reservation.request_id for reservation in decodes[0].reservations]
        assert len(set(ids)) == 2  # under one id the later attempt would end the leases of the other samples


async def test_a_stalled_sample_goes_on_alone(tokens: Tokens) -> None:
    decode = ScriptedDecode(failing=1, failing_sample=1, pace_s=0.05)
    async with house(tokens, [ScriptedPrefill()], [decode], stall_timeout_s=0.8) as h:
        answers = await h.complete_all(3, 30)  # the others get tokens all the time
        assert [answer.finished.failovers for answer in answers] == [0, 1, 0]
        await h.idle()


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.ABORTED, Code.INTERNAL, Code.RESOURCE_EXHAUSTED])
async def test_a_prefill_that_fails_is_made_again_for_all(tokens: Tokens, code: grpc.StatusCode) -> None:
    async with house(tokens, [ScriptedPrefill(failures=[failure(code)])], [ScriptedDecode()]) as h:
        answers = await h.complete_all(3, 6)
        assert starts(h) == [(0, 3, 0), (0, 3, 0)]
        counted = 0 if code is Code.RESOURCE_EXHAUSTED else 1
        assert [answer.finished.failovers for answer in answers] == [counted] * 3
        await h.idle()
        assert sorted(h.decodes[0].aborts) == ["d1-1", "d1-2", "d1-3"]
        assert [reservation.attempt for reservation in h.decodes[0].reservations] == [1, 2]


async def test_a_hand_off_that_fails_after_the_first_tokens(tokens: Tokens) -> None:
    prefills = [ScriptedPrefill(fail_after_first=failure(Code.INTERNAL)), ScriptedPrefill()]
    async with house(tokens, prefills, [ScriptedDecode()]) as h:
        h.backend.pool.workers[1].in_flight += 1  # so that the first one is asked first
        answers = await h.complete_all(3, 6)
        h.backend.pool.workers[1].in_flight -= 1
        assert [answer.finished.failovers for answer in answers] == [1, 1, 1]
        assert starts(h)[0] == (0, 3, 0)
        assert sorted(starts(h)[1:]) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
        await h.idle()


async def test_a_sample_that_fails_for_good_fails_the_call(tokens: Tokens) -> None:
    decode = ScriptedDecode(failing=10, failing_sample=1, failure=failure(Code.ABORTED), after=0, pace_s=0.02)
    async with house(tokens, [ScriptedPrefill()], [decode], max_attempts=2) as h:
        with pytest.raises(grpc.aio.AioRpcError, match=r"sample 1 failed: attempt 1 .*attempt 2") as caught:
            async for _ in h.call(100, n=3):
                pass
        assert caught.value.code() is Code.UNAVAILABLE
        await h.idle()


@pytest.mark.parametrize("moment", ["prefill", "decode"])
async def test_a_client_that_goes_away_frees_every_lease(tokens: Tokens, moment: str) -> None:
    prefill = ScriptedPrefill(hang=moment == "prefill")
    async with house(tokens, [prefill], [ScriptedDecode(pace_s=0.05)]) as h:
        call = h.call(100, n=4)
        if moment == "decode":
            for _ in range(6):
                await call.read()
        await eventually(lambda: prefill.requests and len(h.decodes[0].leases) == 4)
        call.cancel()
        await h.idle()
        await eventually(lambda: sorted(h.decodes[0].aborts) == ["d1-1", "d1-2", "d1-3", "d1-4"])


async def test_a_client_that_goes_away_during_reserve(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(reserve_s=0.3)]) as h:
        call = h.call(n=3)
        await eventually(lambda: h.decodes[0].reserved == 3)
        call.cancel()
        await eventually(lambda: sorted(h.decodes[0].aborts) == ["d1-1", "d1-2", "d1-3"])
        await h.idle()


async def test_more_samples_than_a_batch(tokens: Tokens) -> None:
    decode = ScriptedDecode(max_batch=3)
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        await h.complete_all(8, 6)
        await h.idle()
        assert decode.most_leases <= 3
        assert {start[:2] for start in starts(h)} >= {(0, 3), (3, 3), (6, 2)}


async def test_samples_that_find_room_only_one_by_one(tokens: Tokens) -> None:
    """The blocks are too few for the samples together, though not for each."""
    decode = ScriptedDecode(capacity=1)
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        await h.complete_all(3, 4)
        assert sorted(starts(h)) == [(0, 1, 0), (1, 1, 0), (2, 1, 0)]
        assert decode.most_leases == 1
        await h.idle()


async def test_a_reservation_that_could_never_fit_together(tokens: Tokens) -> None:
    decode = ScriptedDecode(refusals=[failure(Code.INVALID_ARGUMENT)])
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        await h.complete_all(4, 4)
        assert sorted(starts(h)) == [(0, 2, 0), (2, 2, 0)]
        await h.idle()


async def test_logprobs_of_samples(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(repeat=2)]) as h:
        answers = await h.complete_all(3, 6, logprobs=2)
        for sample, answer in enumerate(answers):
            assert answer.logprobs == [logprobs_at(PROMPT, index, sample, 2) for index in range(6)]


async def test_many_at_once_with_failures_and_cancellations(tokens: Tokens) -> None:
    decodes = [
        ScriptedDecode(max_batch=6, capacity=6, pace_s=0.002, failing=5, failure=failure(Code.ABORTED)),
        ScriptedDecode(max_batch=6, capacity=6, pace_s=0.002, preempting=5),
    ]
    async with house(tokens, [ScriptedPrefill(), ScriptedPrefill()], decodes, max_attempts=8) as h:

        async def one(number: int) -> None:
            if number % 4:
                await h.complete_all(1 + number % 5, 8)
                return
            call = h.call(8, n=4)
            await asyncio.sleep(0.01 * (number % 11))
            call.cancel()

        await asyncio.gather(*(one(number) for number in range(40)))
        await h.idle()
        assert not any(decode.failing or decode.preempting for decode in decodes)
