"""A stream whose gateway fails goes on at the next token."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

import branchline.client as sdk
from branchline.client import recovery
from branchline.client.testing import Answer, Break, FakeServer, Fault, Reply, Request

pytestmark = pytest.mark.timeout(60)

TEXT = "forty-two, and not a word less"
OPTIONS = {"prompt": TEXT, "n": 2, "temperature": 0.5}


def script(request: Request) -> Answer:
    """Echoes the prompt; the second sample with the next character of the alphabet."""
    return [Reply(request.prompt), Reply("".join(chr(ord(character) + 1) for character in request.prompt))]


def failing(*lengths: int, after_s: float | None = 0.0, code: str = "UNAVAILABLE") -> list[Fault]:
    """Call by call, after so many more responses."""
    return [Fault(code, "scripted", retry_after=after_s, after=length) for length in lengths]


@contextlib.contextmanager
def serving(*faults: list[Fault | Break]) -> Iterator[list[FakeServer]]:
    """A gateway for each list of faults."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(FakeServer(script)) for _ in faults]
        for server, each in zip(servers, faults, strict=True):
            server.faults.extend(each)
        yield servers


def check(result: sdk.Completion) -> None:
    assert [sample.text for sample in result.samples] == [TEXT, "".join(chr(ord(c) + 1) for c in TEXT)]
    assert [len(sample.token_ids) for sample in result.samples] == [len(TEXT)] * 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "PAUSE_S", 0.01)


def test_it_goes_on_as_often_as_it_must() -> None:
    with serving(failing(5, 1, 0, 7, 46, 1)) as [server], sdk.Client(server.target) as client:
        check(client.complete(**OPTIONS))
    requests = [request.message for request in server.requests]
    assert len(requests) == 7
    assert len({request.seed for request in requests}) == 1
    assert all(request.HasField("seed") for request in requests)
    assert not requests[0].received


def test_it_goes_on_when_the_connection_is_lost() -> None:
    with serving([Break(3), Break()]) as [server], sdk.Client(server.target) as client:
        check(client.complete(**OPTIONS))
        assert [len(sample.token_ids) for sample in server.requests[1].message.received] == [2, 1]


async def test_it_goes_on_asynchronously() -> None:
    with serving(failing(5, 0, 20)) as [server]:
        async with sdk.AsyncClient(server.target) as client:
            check(await client.complete(**OPTIONS))


def test_another_gateway_takes_over() -> None:
    with serving(failing(9, *[0] * 20), []) as servers:
        first, second = servers
        with sdk.Client(f"{first.target},{second.target}") as client:
            check(client.complete(**OPTIONS))
            assert [len(sample.token_ids) for sample in second.requests[0].message.received] == [5, 4]
            check(client.complete(**OPTIONS))
            assert len(first.requests) == 1


async def test_another_gateway_takes_over_asynchronously() -> None:
    with serving(failing(9, *[0] * 20), []) as servers:
        first, second = servers
        async with sdk.AsyncClient(f"{first.target},{second.target}") as client:
            check(await client.complete(**OPTIONS))
            assert (len(first.requests), len(second.requests)) == (1, 1)


def test_a_gateway_that_nobody_serves_is_left() -> None:
    with serving([]) as [server], sdk.Client(f"127.0.0.1:1,{server.target}") as client:
        check(client.complete(**OPTIONS))
        assert client.info().model == "fake"


@pytest.mark.parametrize(
    ("faults", "retries", "calls"),
    [
        (failing(5, 0, 0, 0, 0), 2, 3),
        (failing(5), 0, 1),
        ([Break(5), Break(), Break()], 2, 3),
        ([Break(5)], 0, 1),
        (failing(5, after_s=None), 3, 1),  # the server says that it is of no use
        (failing(5, after_s=None, code="RESOURCE_EXHAUSTED"), 3, 1),
        (failing(5, after_s=60), 3, 1),  # longer than the call has
        (failing(5, code="INTERNAL"), 3, 1),
    ],
)
def test_a_failure_that_stays_is_raised(faults: list[Fault | Break], retries: int, calls: int) -> None:
    with serving(faults) as [server], sdk.Client(server.target, retries=retries, timeout=10) as client:
        with pytest.raises(sdk.BranchlineError, match=r"scripted|lost"):
            client.complete(**OPTIONS)
        assert len(server.requests) == calls


def test_a_full_gateway_is_asked_again_when_it_says() -> None:
    with serving(failing(0, after_s=0.3, code="RESOURCE_EXHAUSTED")) as [server], sdk.Client(server.target) as client:
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
