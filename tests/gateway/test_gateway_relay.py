"""The gateway against workers over real gRPC: relaying, failing over, cancelling, refusing."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from gateway_harness import PROMPT, house
from scripted_workers import (
    ScriptedDecode,
    ScriptedPrefill,
    eventually,
    expected_tokens,
    logprobs_at,
    running,
    token_at,
)

from branchline.core import Fingerprint
from branchline.v1 import gateway_pb2, types_pb2
from branchline.wire.status import RpcFailure
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

Code = grpc.StatusCode


def failure(code: grpc.StatusCode) -> RpcFailure:
    return RpcFailure(code, "scripted")


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def test_happy_path(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        answer = await h.complete(8, seed=5, temperature=0.5)
        done = answer.finished
        assert done.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert (done.usage.prompt_tokens, done.seed, done.failovers) == (3, 5, 0)
        assert (done.speculation.target_forwards, done.speculation.drafted) == (7, 14)
        request = h.prefills[0].requests[0]
        assert (request.sampling.seed, request.sampling.temperature, list(request.stop_token_ids)) == (5, 0.5, [0])
        await h.idle()
        assert h.decodes[0].aborts == []  # a lease that finished needs none


async def test_every_option_reaches_the_workers(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        options = {
            "seed": 5,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.25,
            "frequency_penalty": -0.25,
        }
        await h.complete(
            8,
            **options,
            logit_bias=[types_pb2.LogitBias(token_id=3, bias=-1.5)],
            bad_words=["fox"],
            min_tokens=3,
            logprobs=4,
            draft_nodes=2,
        )
        for request in (h.prefills[0].requests[0], h.decodes[0].requests[0]):
            assert {name: getattr(request.sampling, name) for name in options} == options
            assert [(entry.token_id, entry.bias) for entry in request.sampling.logit_bias] == [(3, -1.5)]
            words = [tuple(word.token_ids) for word in request.sampling.bad_words]
            assert words == [tokens.encode_word("fox"), tokens.encode_word(" fox")]
            assert (request.min_tokens, request.logprobs, request.draft_nodes) == (3, 4, 2)


async def test_unset_options_stay_unset(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        await h.complete(4)
        for request in (h.prefills[0].requests[0], h.decodes[0].requests[0]):
            assert not request.HasField("logprobs")
            assert not request.HasField("draft_nodes")
            assert request.sampling.repetition_penalty == 1.0


@pytest.mark.parametrize("top", [0, 3])
async def test_logprobs_are_relayed_token_by_token(tokens: Tokens, top: int) -> None:
    decode = ScriptedDecode(repeat=2, failing=1, failure=failure(Code.UNAVAILABLE))
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        answer = await h.complete(8, logprobs=top)
        assert answer.logprobs == [logprobs_at(PROMPT, index, 0, top) for index in range(8)]
        assert answer.finished.failovers == 1
        assert not (await h.complete(8)).logprobs


async def test_logprobs_are_cut_with_the_tokens(tokens: Tokens) -> None:
    text = tokens.decode(expected_tokens(PROMPT, 20))
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        answer = await h.answer(20, stop=[text[4:7]], logprobs=1)
        count = answer.finished.usage.completion_tokens
        assert count < 20
        assert answer.logprobs == [logprobs_at(PROMPT, index, 0, 1) for index in range(count)]


async def test_a_worker_that_forgets_the_logprobs(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill(forget_logprobs=True)], [ScriptedDecode()], max_attempts=1) as h:
        error = await refused(h.call(logprobs=1))
        assert "1 tokens came with 0 log-probabilities" in error.details()
        assert h.backend.pool.workers[0].avoided  # it is avoided
        await h.idle()


async def test_text_prompt(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        answer = await h.answer(5, prompt="the fox")
        prompt = tuple(tokens._tokenizer.encode("the fox"))
        assert answer.token_ids == expected_tokens(prompt, 5)


async def test_first_token_comes_before_the_hand_off(tokens: Tokens) -> None:
    prefill = ScriptedPrefill(fail_after_first=failure(Code.INTERNAL))
    async with house(tokens, [prefill], [ScriptedDecode()], max_attempts=1) as h:
        call = h.call()
        assert list((await call.read()).token_ids) == expected_tokens(PROMPT, 1)
        with pytest.raises(grpc.aio.AioRpcError, match=r"attempt 1 .*INTERNAL: scripted"):
            await call.read()
        await h.idle()


async def test_many_requests_over_two_pairs(tokens: Tokens) -> None:
    decodes = [ScriptedDecode(capacity=2, pace_s=0.005), ScriptedDecode(capacity=2, pace_s=0.005)]
    async with house(tokens, [ScriptedPrefill(), ScriptedPrefill()], decodes) as h:
        await asyncio.gather(*(h.complete(6) for _ in range(30)))
        await h.idle()
        assert all(1 <= decode.most_leases <= 2 for decode in decodes)
        assert all(prefill.requests for prefill in h.prefills)


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.ABORTED, Code.INTERNAL, Code.DATA_LOSS, Code.NOT_FOUND])
async def test_a_broken_token_stream_goes_on_elsewhere(tokens: Tokens, code: grpc.StatusCode) -> None:
    decodes = [ScriptedDecode(failing=1, failure=failure(code)), ScriptedDecode(failing=1, failure=failure(code))]
    async with house(tokens, [ScriptedPrefill()], decodes) as h:
        answer = await h.complete(12)
        failovers = answer.finished.failovers
        # ABORTED is a worker's right (to make room, say): it is not avoided for it, as one that fails is.
        assert failovers == (1 if code is Code.ABORTED else 2)
        assert [len(request.emitted) for request in h.prefills[0].requests] == [0, 3, 6][: failovers + 1]
        assert {request.sampling.seed for request in h.prefills[0].requests} == {answer.finished.seed}
        await h.idle()


async def test_a_killed_decode_worker(tokens: Tokens) -> None:
    decodes = [ScriptedDecode(pace_s=0.02), ScriptedDecode(pace_s=0.02)]
    async with house(tokens, [ScriptedPrefill()], decodes) as h:
        task = asyncio.create_task(h.complete(30))
        await eventually(lambda: any(decode.leases for decode in decodes))
        await asyncio.sleep(0.2)
        victim = next(index for index, decode in enumerate(decodes) if decode.leases)
        await h.servers[1 + victim].stop(0)
        assert (await task).finished.failovers == 1
        await h.complete(5)  # and nobody asks it again
        await h.idle()


async def test_the_only_decode_worker_restarts_on_its_address(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(pace_s=0.02)]) as h:
        task = asyncio.create_task(h.complete(30))
        await eventually(lambda: h.decodes[0].leases)
        await asyncio.sleep(0.1)
        await h.servers[1].stop(0)
        await asyncio.sleep(0.5)
        async with running(ScriptedDecode(incarnation="d2"), int(h.addresses[1].rpartition(":")[2])):
            assert (await task).finished.failovers == 1


async def test_the_only_decode_worker_comes_back_elsewhere(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(pace_s=0.02)]) as h, running(ScriptedDecode()) as new:
        task = asyncio.create_task(h.complete(30))
        await eventually(lambda: h.decodes[0].leases)
        await asyncio.sleep(0.1)
        # From another thread, as the cluster's supervisor does; the old worker still runs.
        await asyncio.to_thread(h.backend.pool.update, h.addresses[:1], [new[1]])
        assert (await task).finished.failovers == 1
        assert h.backend.pool.tasks == 2
        await h.idle()


async def test_a_hung_decode_worker(tokens: Tokens) -> None:
    decodes = [ScriptedDecode(failing=1), ScriptedDecode(failing=1)]
    async with house(tokens, [ScriptedPrefill()], decodes, stall_timeout_s=0.3) as h:
        answer = await h.complete(12)
        assert answer.finished.failovers == 2
        await h.idle()
        assert sorted(len(decode.aborts) for decode in decodes) == [1, 1]


async def test_a_hung_prefill_worker(tokens: Tokens) -> None:
    prefills = [ScriptedPrefill(hang=True), ScriptedPrefill()]
    async with house(tokens, prefills, [ScriptedDecode()], stall_timeout_s=0.3) as h:
        for _ in range(3):
            await h.complete(4)
        assert len(prefills[0].requests) <= 1  # avoided after it has hung
        await h.idle()


async def test_a_queue_at_the_prefill_worker_is_no_stall(tokens: Tokens) -> None:
    prefill = ScriptedPrefill(slow_s=2.5, computing=True)
    async with house(tokens, [prefill], [ScriptedDecode()], stall_timeout_s=1.5) as h:
        await eventually(lambda: h.backend.pool.workers[0].progressed_within(1.0), 5)
        assert (await h.complete(4)).finished.failovers == 0


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.ABORTED, Code.INTERNAL, Code.DATA_LOSS])
async def test_a_prefill_that_fails_is_made_again(tokens: Tokens, code: grpc.StatusCode) -> None:
    async with house(tokens, [ScriptedPrefill(failures=[failure(code)])], [ScriptedDecode()]) as h:
        assert (await h.complete(6)).finished.failovers == 1
        await h.idle()
        assert h.decodes[0].aborts == ["d1-1"]


async def test_attempts_are_bounded_and_the_reasons_kept(tokens: Tokens) -> None:
    prefill = ScriptedPrefill(failures=[failure(Code.INTERNAL)] * 10)
    async with house(tokens, [prefill], [ScriptedDecode()], max_attempts=3) as h:
        error = await refused(h.call())
        assert error.code() is Code.UNAVAILABLE
        assert error.details().count("INTERNAL: scripted") == 3
        assert len(prefill.requests) == 3
        await h.idle()


async def test_a_request_that_workers_refuse_is_not_tried_again(tokens: Tokens) -> None:
    prefill = ScriptedPrefill(failures=[failure(Code.INVALID_ARGUMENT)] * 2)
    decode = ScriptedDecode()
    async with house(tokens, [prefill], [decode]) as h:
        for _ in range(2):
            error = await refused(h.call())
            assert (error.code(), error.details()) == (Code.INVALID_ARGUMENT, "scripted")
            decode.refusals = [failure(Code.INVALID_ARGUMENT)]
        await h.idle()
        assert len(prefill.requests) == 1


async def test_busy_workers_are_asked_again(tokens: Tokens) -> None:
    prefill = ScriptedPrefill(failures=[failure(Code.RESOURCE_EXHAUSTED)] * 5)
    decode = ScriptedDecode(refusals=[failure(Code.RESOURCE_EXHAUSTED)] * 5)
    async with house(tokens, [prefill], [decode]) as h:
        assert (await h.complete(6)).finished.failovers == 0
        await h.idle()


async def test_full_until_the_deadline(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(capacity=0)], request_timeout_s=0.4) as h:
        errors = await asyncio.gather(*(refused(h.call(timeout=None)) for _ in range(3)))
        assert {error.code() for error in errors} == {Code.RESOURCE_EXHAUSTED}
        await h.idle()


async def test_the_gateways_own_deadline(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(pace_s=0.1)], request_timeout_s=0.5) as h:
        error = await refused(h.call(100, timeout=None))
        assert error.code() is Code.DEADLINE_EXCEEDED
        await h.idle()
        assert not any(worker.avoided for worker in h.backend.pool.workers)  # time was up; no worker is to blame


async def test_the_clients_deadline(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(pace_s=0.1)]) as h:
        assert (await refused(h.call(100, timeout=0.5))).code() is Code.DEADLINE_EXCEEDED
        await h.idle()


@pytest.mark.parametrize("moment", ["prefill", "decode"])
async def test_a_client_that_goes_away(tokens: Tokens, moment: str) -> None:
    prefill = ScriptedPrefill(hang=moment == "prefill")
    async with house(tokens, [prefill], [ScriptedDecode(pace_s=0.05)]) as h:
        call = h.call(100)
        if moment == "decode":
            for _ in range(3):
                await call.read()
        await eventually(lambda: prefill.requests and h.decodes[0].leases)
        call.cancel()
        await h.idle(within_s=1.0)
        await eventually(lambda: h.decodes[0].aborts == ["d1-1"], 1.0)
        assert h.decodes[0].cancelled in (["d1-1"], [])  # Abort or the closed stream, whichever came first


async def test_a_client_that_goes_away_during_reserve(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(reserve_s=0.3)]) as h:
        call = h.call()
        await eventually(lambda: h.decodes[0].reserved == 1)
        call.cancel()
        await eventually(lambda: h.decodes[0].aborts == ["d1-1"], 1.0)
        await h.idle()


async def test_one_token(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        answer = await h.complete(1)
        assert answer.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
        await h.idle()
        assert h.decodes[0].aborts == ["d1-1"]


async def test_the_first_token_ends_the_request(tokens: Tokens) -> None:
    prefill = ScriptedPrefill(finish_first=types_pb2.FINISH_REASON_STOP)
    async with house(tokens, [prefill], [ScriptedDecode()]) as h:
        answer = await h.answer(8)
        assert answer.token_ids == expected_tokens(PROMPT, 1)
        assert answer.finished.finish_reason == types_pb2.FINISH_REASON_STOP
        await h.idle()
        assert h.decodes[0].aborts == ["d1-1"]


async def test_a_stop_string_ends_the_request(tokens: Tokens) -> None:
    text = tokens.decode(expected_tokens(PROMPT, 20))
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        answer = await h.answer(20, stop=[text[4:7]])
        assert answer.text == text[: text.index(text[4:7])]
        assert answer.finished.finish_reason == types_pb2.FINISH_REASON_STOP
        count = answer.finished.usage.completion_tokens
        assert answer.token_ids == expected_tokens(PROMPT, count)
        assert text[4:7] in tokens.decode(answer.token_ids)
        assert count < 20
        await h.idle()
        assert h.decodes[0].aborts == ["d1-1"]


async def test_tokens_that_come_twice_are_taken_once(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(repeat=3)]) as h:
        assert (await h.complete(10)).finished.failovers == 0


async def test_a_gap_starts_a_new_attempt(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(skip_at=4)]) as h:
        assert (await h.complete(10)).finished.failovers == 1
        await h.idle()


async def test_a_worker_that_dies_with_the_last_token_sent(tokens: Tokens) -> None:
    decode = ScriptedDecode()
    original = decode._tokens

    async def without_end(request):
        async for response in original(request):
            if response.WhichOneof("event") == "finished":
                raise failure(Code.UNAVAILABLE)
            yield response

    decode._tokens = without_end
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        answer = await h.complete(6)
        assert answer.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert len(h.prefills[0].requests) == 1


async def test_different_models_are_never_paired(tokens: Tokens) -> None:
    other = Fingerprint(target={"weights": "w2", "dtype": "float32"})
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(fingerprint=other)]) as h:
        error = await refused(h.call())
        assert error.code() is Code.UNAVAILABLE
        assert "weights: w1 != w2" in error.details()
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(fingerprint=other), ScriptedDecode()]) as h:
        await h.complete(5)
        assert h.decodes[0].reserved == 0


async def test_a_worker_that_comes_back_as_another_is_paired_no_more(tokens: Tokens) -> None:
    """The same address after a restart, other weights: its KV must not be mixed with the others'."""
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode(), ScriptedDecode()], worker_wait_s=0.5) as h:
        await h.complete()
        address = h.addresses[1]
        worker = next(worker for worker in h.backend.pool.workers if worker.address == address)
        await h.servers[1].stop(0)
        await eventually(lambda: not worker.healthy, 10)
        returned = ScriptedDecode(fingerprint=Fingerprint(target={"weights": "w2"}), incarnation="d2")
        async with running(returned, int(address.rpartition(":")[2])):
            await eventually(lambda: worker.healthy, 10)
            for _ in range(6):
                await h.complete()
            assert returned.reserved == 0
            await h.servers[2].stop(0)  # the last one that fits
            error = await refused(h.call())
            assert error.code() is Code.UNAVAILABLE
            assert returned.reserved == 0
        await eventually(lambda: not h.backend.pool.in_flight)


async def test_a_pair_that_turns_out_not_to_fit(tokens: Tokens) -> None:
    mismatch = RpcFailure(Code.FAILED_PRECONDITION, "rope: a != b")
    decodes = [ScriptedDecode(refusals=[mismatch]), ScriptedDecode()]
    async with house(tokens, [ScriptedPrefill()], decodes) as h:
        assert (await h.complete(5)).finished.failovers == 0
        await h.idle()
    decodes = [ScriptedDecode(refusals=[mismatch] * 5), ScriptedDecode(refusals=[mismatch] * 5)]
    async with house(tokens, [ScriptedPrefill()], decodes) as h:
        error = await refused(h.call())
        assert error.code() is Code.UNAVAILABLE
        assert "rope: a != b" in error.details()
        assert [len(decode.refusals) for decode in decodes] == [4, 4]  # asked once each
        await h.idle()


async def test_no_worker_of_a_role(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()], worker_wait_s=0.5) as h:
        await h.servers[1].stop(0)
        begin = time.monotonic()
        error = await refused(h.call())
        assert error.code() is Code.UNAVAILABLE
        assert "only a prefill worker" in error.details()
        assert time.monotonic() - begin < 5
        await h.idle()
        async with running(ScriptedDecode(), int(h.addresses[1].rpartition(":")[2])):
            await eventually(lambda: h.backend.pool.pairs().fitting, 5)
            await h.complete(5)  # serving resumes by itself


async def test_too_many_requests(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill(hang=True)], [ScriptedDecode()], max_requests=2) as h:
        calls = [h.call(), h.call()]
        await eventually(lambda: h.desk.door.active_requests == 2)
        assert (await refused(h.call())).code() is Code.RESOURCE_EXHAUSTED
        for call in calls:
            call.cancel()
        await h.idle()


async def test_bad_input_over_the_wire(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        error = await refused(h.call(-1))
        assert error.code() is Code.INVALID_ARGUMENT
        assert "max_tokens" in error.details()
        assert not h.prefills[0].requests
        await h.idle()


async def test_info(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        call = h.call(100)
        h.decodes[0].pace_s = 0.05
        await call.read()
        info = await h.stub.GetInfo(gateway_pb2.GetInfoRequest(), timeout=5)
        assert (info.model, info.max_model_len, info.tree, info.active_requests) == ("scripted", 256, "none", 1)
        roles = {worker.role: worker for worker in info.workers}
        assert (roles["decode"].blocks_total, roles["decode"].requests) == (20, 1)
        assert all(worker.healthy for worker in info.workers)
        call.cancel()
        await h.idle()
        await h.servers[1].stop(0)
        info = await h.stub.GetInfo(gateway_pb2.GetInfoRequest(), timeout=5)
        assert {worker.role: worker.healthy for worker in info.workers} == {"prefill": True, "decode": False}


async def test_random_cancellations_leave_nothing_behind(tokens: Tokens) -> None:
    decodes = [ScriptedDecode(capacity=4, pace_s=0.002), ScriptedDecode(capacity=4, pace_s=0.002)]
    async with house(tokens, [ScriptedPrefill()], decodes) as h:

        async def one(number: int) -> None:
            if number % 3:
                await h.complete(10)
                return
            call = h.call(10)
            await asyncio.sleep(0.007 * (number % 17))
            call.cancel()

        await asyncio.gather(*(one(number) for number in range(90)))
        await h.idle()


def test_the_scripted_model_is_deterministic() -> None:
    assert token_at(PROMPT, 3) == expected_tokens(PROMPT, 5)[3]
