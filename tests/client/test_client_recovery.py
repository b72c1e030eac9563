"""A stream whose gateway fails goes on at the next token."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import grpc
import pytest
from client_servicer import ScriptedGateway, ServerThread

import branchline.client as sdk
from branchline.client import recovery
from branchline.v1 import gateway_pb2
from branchline.wire.status import RpcFailure

pytestmark = [pytest.mark.wire, pytest.mark.timeout(60)]

TEXT = "forty-two, and not a word less"
OPTIONS = {"prompt": TEXT, "n": 2, "temperature": 0.5}


class Failing(ScriptedGateway):
    """Echoes the prompt behind what the client has, and fails after `lengths` more responses, call by call."""

    def __init__(self, lengths: Sequence[int], failure: RpcFailure) -> None:
        super().__init__()
        self._lengths = list(lengths)
        self._failure = failure

    async def Generate(self, request, context):  # noqa: N802
        left = self._lengths.pop(0) if self._lengths else None
        received = request.received or [gateway_pb2.ReceivedSample()] * request.n
        stream = super().Generate(request, context)
        seen = [0] * request.n
        async with contextlib.aclosing(stream):
            async for response in stream:
                seen[response.sample] += len(response.token_ids)
                had = received[response.sample]
                if had.finished or (response.token_ids and seen[response.sample] <= len(had.token_ids)):
                    continue
                if left == 0:
                    raise self._failure
                yield response
                left = None if left is None else left - 1


@contextlib.contextmanager
def serving(*gateways: ScriptedGateway) -> Iterator[list[ServerThread]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ServerThread(gateway).running()) for gateway in gateways]


def failing(*lengths: int, after_s: float | None = 0.0, code: str = "UNAVAILABLE") -> Failing:
    return Failing(lengths, RpcFailure(grpc.StatusCode[code], "scripted", retry_after_s=after_s))


def check(result: sdk.Completion) -> None:
    assert [sample.text for sample in result.samples] == [TEXT + ".", "".join(chr(ord(c) + 1) for c in TEXT) + "."]
    assert [len(sample.token_ids) for sample in result.samples] == [len(TEXT)] * 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "PAUSE_S", 0.01)


def test_it_goes_on_as_often_as_it_must() -> None:
    gateway = failing(5, 1, 0, 7, 46, 1)
    with serving(gateway) as [server], sdk.Client(server.target) as client:
        check(client.complete(**OPTIONS))
    assert len(gateway.requests) == 7
    assert len({request.seed for request in gateway.requests}) == 1
    assert all(request.HasField("seed") for request in gateway.requests)
    assert not gateway.requests[0].received


async def test_it_goes_on_asynchronously() -> None:
    with serving(failing(5, 0, 20)) as [server]:
        async with sdk.AsyncClient(server.target) as client:
            check(await client.complete(**OPTIONS))


def test_another_gateway_takes_over() -> None:
    first, second = failing(9, *[0] * 20), failing()
    with serving(first, second) as servers, sdk.Client(",".join(server.target for server in servers)) as client:
        check(client.complete(**OPTIONS))
        assert [len(sample.token_ids) for sample in second.requests[0].received] == [5, 4]
        check(client.complete(**OPTIONS))
        assert len(first.requests) == 1


async def test_another_gateway_takes_over_asynchronously() -> None:
    first, second = failing(9, *[0] * 20), failing()
    with serving(first, second) as servers:
        async with sdk.AsyncClient(",".join(server.target for server in servers)) as client:
            check(await client.complete(**OPTIONS))
            assert (len(first.requests), len(second.requests)) == (1, 1)


def test_a_gateway_that_nobody_serves_is_left() -> None:
    with serving(failing()) as [server], sdk.Client(f"127.0.0.1:1,{server.target}") as client:
        check(client.complete(**OPTIONS))
        assert client.info().model == "tiny"


@pytest.mark.parametrize(
    ("gateway", "retries", "calls"),
    [
        (failing(5, 0, 0, 0, 0), 2, 3),
        (failing(5), 0, 1),
        (failing(5, after_s=None), 3, 1),  # the server says that it is of no use
        (failing(5, after_s=None, code="RESOURCE_EXHAUSTED"), 3, 1),
        (failing(5, after_s=60), 3, 1),  # longer than the call has
        (failing(5, code="INTERNAL"), 3, 1),
    ],
)
def test_a_failure_that_stays_is_raised(gateway: Failing, retries: int, calls: int) -> None:
    with serving(gateway) as [server], sdk.Client(server.target, retries=retries, timeout=10) as client:
        with pytest.raises(sdk.BranchlineError, match="scripted"):
            client.complete(**OPTIONS)
        assert len(gateway.requests) == calls


def test_a_full_gateway_is_asked_again_when_it_says() -> None:
    gateway = failing(0, after_s=0.3, code="RESOURCE_EXHAUSTED")
    with serving(gateway) as [server], sdk.Client(server.target) as client:
        began = time.monotonic()
        check(client.complete(**OPTIONS))
        assert time.monotonic() - began >= 0.3


def test_a_stream_that_waits_can_be_closed() -> None:
    with serving(failing(5, after_s=5)) as [server], sdk.Client(server.target) as client:
        stream = client.generate(**OPTIONS)
        closing = threading.Timer(0.3, stream.close)
        closing.start()
        began = time.monotonic()
        with pytest.raises(sdk.UnavailableError):
            list(stream)
        assert time.monotonic() - began < 4.5  # the gateway says to wait for 5
        closing.join()


async def test_a_stream_that_waits_can_be_cancelled() -> None:
    with serving(failing(5, after_s=5)) as [server]:
        async with sdk.AsyncClient(server.target) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await client.complete(**OPTIONS)


@pytest.mark.parametrize("retries", [-1, 101, True, 1.0])
def test_a_wrong_number_of_retries_is_refused(retries: object) -> None:
    with pytest.raises(sdk.InvalidRequestError, match="retries"):
        sdk.Client("127.0.0.1:1", retries=retries)
