"""A client whose stream broke goes on at another gateway, behind what it has."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from gateway_harness import Answer, House, house
from scripted_workers import ScriptedDecode, ScriptedPrefill

from branchline.v1 import gateway_pb2, types_pb2
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

OPTIONS: dict[str, Any] = {"n": 2, "seed": 7, "temperature": 0.5, "logprobs": 1}


def received(answers: list[Answer]) -> list[gateway_pb2.ReceivedSample]:
    return [
        gateway_pb2.ReceivedSample(token_ids=answer.token_ids, finished=answer.finished is not None)
        for answer in answers
    ]


async def test_wherever_it_breaks_the_rest_is_what_was_missing(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        responses = [response async for response in h.call(12, **OPTIONS)]
        whole = [Answer(), Answer()]
        for response in responses:
            whole[response.sample].add(response)
        for cut in range(len(responses)):
            answers = [Answer(), Answer()]
            for response in responses[:cut]:
                answers[response.sample].add(response)
            async for response in h.call(12, received=received(answers), **OPTIONS):
                answers[response.sample].add(response)
            for answer, complete in zip(answers, whole, strict=True):
                assert (answer.text, answer.token_ids) == (complete.text, complete.token_ids)
                assert answer.logprobs == complete.logprobs
                assert answer.finished.usage.completion_tokens == 12
                assert answer.finished.finish_reason == complete.finished.finish_reason
        await h.idle()


async def test_a_stop_string_across_the_break(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        free = await h.answer(12)
        stop = free.text[len(tokens.decode(free.token_ids[:5])) - 1 :][:3]
        assert stop in free.text[1:]
        responses = [response async for response in h.call(12, stop=[stop])]
        for cut in range(len(responses)):
            answer = Answer()
            for response in responses[:cut]:
                answer.add(response)
            async for response in h.call(12, stop=[stop], received=received([answer])):
                answer.add(response)
            assert answer.text == free.text[: free.text.index(stop)]
            assert answer.finished.finish_reason == types_pb2.FINISH_REASON_STOP
        await h.idle()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 2, "received": [{}]}, "received: must be there for all 2"),
        ({"received": [{"finished": True}]}, "received: all samples are finished"),
        ({"received": [{"token_ids": [1]}], "temperature": 0.5}, "their seed must be given"),
        ({"received": [{"token_ids": [1, 999]}]}, r"received\[0\].token_ids\[1\]: 999 is not below"),
        ({"received": [{"token_ids": [1] * 9}]}, r"received\[0\].token_ids: 9 are more than max_tokens, 8"),
        ({"received": [{"token_ids": [0, 1]}]}, "goes on behind token 0"),
    ],
)
async def test_what_cannot_be_a_beginning_is_refused(tokens: Tokens, given: dict[str, Any], message: str) -> None:
    assert tokens.eos_ids == (0,)
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        with pytest.raises(grpc.aio.AioRpcError, match=message) as refused:
            await _all(h, given)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await h.idle()


async def _all(h: House, given: dict[str, Any]) -> None:
    async for _ in h.call(8, **given):
        pass
