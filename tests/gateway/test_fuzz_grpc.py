"""Malformed requests over gRPC: each gets an answer that says what is wrong, and nothing of it stays."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import grpc
import pytest
from fuzz_messages import bytes_of
from gateway_harness import House, house
from google.protobuf.descriptor import MethodDescriptor
from scripted_workers import ScriptedDecode, ScriptedPrefill

from branchline.v1 import gateway_pb2
from branchline.wire.channels import open_channel
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(1800)]

METHODS = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].methods
#: Seconds in which each must be answered: the scripted workers take none.
ANSWER_S = 20.0
AT_ONCE = 16
#: What a request may end with. INTERNAL and UNKNOWN would be our mistake, DEADLINE_EXCEEDED a hang.
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


def good_request(draw: random.Random) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=[41, 42, draw.randrange(40, 60)]),
        max_tokens=draw.randrange(1, 9),
        n=draw.randrange(1, 3),
        temperature=draw.random(),
        stop=["x"],
        logprobs=draw.randrange(3),
    )


def good_chat(draw: random.Random) -> gateway_pb2.ChatRequest:
    message = gateway_pb2.ChatMessage(role="user", content="ab" * draw.randrange(1, 9))
    return gateway_pb2.ChatRequest(
        messages=[message],
        options=gateway_pb2.GenerateRequest(max_tokens=draw.randrange(1, 9)),
    )


#: What is right, for the damage to begin with.
GOOD: dict[str, Any] = {"Generate": good_request, "Chat": good_chat}


async def send(channel: grpc.aio.Channel, method: MethodDescriptor, data: bytes) -> grpc.StatusCode:
    path = f"/{method.containing_service.full_name}/{method.name}"
    metadata: Any = (("x-fuzz", "1"),)
    try:
        if method.server_streaming:
            async for _ in channel.unary_stream(path)(data, timeout=ANSWER_S, metadata=metadata):
                pass
        else:
            await channel.unary_unary(path)(data, timeout=ANSWER_S, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), error.details()
    else:
        return grpc.StatusCode.OK
    assert details, f"{code} without a word"
    return code


async def check_serves(h: House) -> None:
    await h.idle(5.0)
    await h.complete()
    status = await h.stub.GetStatus(gateway_pb2.GetStatusRequest(), timeout=ANSWER_S)
    assert not status.requests


async def test_malformed_requests_are_answered_and_leave_nothing(tokens: Tokens, fuzz: int) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    numbers = iter(range(fuzz))
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h, open_channel(h.target) as channel:

        async def client() -> None:
            for number in numbers:
                draw = random.Random(f"grpc {number}")
                method = METHODS[number % len(METHODS)]
                data = bytes_of(draw, method.input_type, GOOD.get(method.name))
                code = await send(channel, method, data)
                counts[method.name, code.name] += 1
                assert code in ALLOWED, f"number {number}: {method.name} {data!r}: {code}"

        before = len(asyncio.all_tasks())
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(client())
        await check_serves(h)
        assert len(asyncio.all_tasks()) <= before + AT_ONCE
    for (name, code), count in sorted(counts.items()):
        print(f"{name:<12} {code:<20} {count:>6}")
    assert counts.total() == fuzz
    for name in GOOD:
        assert counts[name, "OK"], "all were refused: most of the service was not reached"
        assert counts[name, "INVALID_ARGUMENT"]
