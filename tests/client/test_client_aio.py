from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator

import pytest

from branchline import client as sdk
from branchline.client import AsyncClient, AsyncStream
from branchline.client.testing import FakeServer, Raw
from branchline.v1 import gateway_pb2


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


async def drain(stream: AsyncStream) -> list[str]:
    return [chunk.text async for chunk in stream]


async def test_complete_returns_everything(client: AsyncClient, server: FakeServer) -> None:
    result = await client.complete(token_ids=[1, 2], seed=3)
    assert (result.text, result.token_ids, result.finish_reason, result.seed) == ("\x01\x02", (1, 2), "stop", 3)
    assert list(server.requests[0].message.token_ids.ids) == [1, 2]


async def test_generate_streams(client: AsyncClient) -> None:
    stream = client.generate(prompt="añ")
    with pytest.raises(RuntimeError, match="not come to its end"):
        _ = stream.result
    assert [(chunk.text, chunk.token_ids) async for chunk in stream] == [("a", (97,)), ("ñ", (241,)), ("", ())]
    assert stream.result.text == "añ"
    assert 0 < stream.result.time_to_first_token_s <= stream.result.duration_s < 10


async def test_samples_and_logprobs(client: AsyncClient) -> None:
    stream = client.generate(prompt="ab", n=2, logprobs=1)
    parts = [(chunk.sample, chunk.text, len(chunk.logprobs), chunk.finish_reason) async for chunk in stream]
    assert parts[:4] == [(0, "a", 1, None), (1, "b", 1, None), (0, "b", 1, None), (1, "c", 1, None)]
    assert parts[4:] == [(0, "", 0, "stop"), (1, "", 0, "stop")]
    result = await client.complete(prompt="ab", n=2, logprobs=1)
    assert [sample.text for sample in result.samples] == ["ab", "bc"]
    assert [sample.logprobs for sample in stream.result.samples] == [sample.logprobs for sample in result.samples]
    assert result.samples[1].logprobs[1].top == ((99, -1.5),)


class TestCancellation:
    async def test_leaving_the_loop(self, client: AsyncClient, server: FakeServer) -> None:
        async for _ in client.generate(prompt="!wait"):
            break
        gc.collect()
        await asyncio.to_thread(server.wait_idle)

    async def test_leaving_the_block(self, client: AsyncClient, server: FakeServer) -> None:
        async with client.generate(prompt="!wait") as stream:
            await anext(stream)
        await asyncio.to_thread(server.wait_idle)

    async def test_cancelling_the_task(self, client: AsyncClient, server: FakeServer) -> None:
        task = asyncio.create_task(client.complete(prompt="!wait"))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(server.wait_idle)

    async def test_a_timeout_of_asyncio(self, client: AsyncClient, server: FakeServer) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.complete(prompt="!wait")
        await asyncio.to_thread(server.wait_idle)

    async def test_close_from_another_task(self, client: AsyncClient, server: FakeServer) -> None:
        """The reader gets an error of ours: its own task has not been cancelled."""
        stream = client.generate(prompt="!wait")
        await anext(stream)
        reader = asyncio.create_task(drain(stream))
        await asyncio.sleep(0.1)
        await stream.close()
        with pytest.raises(sdk.CancelledError):
            await reader
        with pytest.raises(sdk.CancelledError):
            await anext(stream)
        await asyncio.to_thread(server.wait_idle)

    async def test_closing_the_client(self, server: FakeServer) -> None:
        client = AsyncClient(server.target)
        stream = client.generate(prompt="!wait")
        await anext(stream)
        reader = asyncio.create_task(drain(stream))
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(sdk.CancelledError):
            await reader
        await asyncio.to_thread(server.wait_idle)
        with pytest.raises(sdk.BranchlineError, match="the client is closed"):
            await client.complete(prompt="x")
        await client.close()


async def test_the_deadline(client: AsyncClient, server: FakeServer) -> None:
    with pytest.raises(sdk.DeadlineExceededError):
        await client.complete(prompt="!wait", timeout=0.3)
    await asyncio.to_thread(server.wait_idle)


@pytest.mark.parametrize(
    ("code", "error"),
    [("INVALID_ARGUMENT", sdk.InvalidRequestError), ("RESOURCE_EXHAUSTED", sdk.OverloadedError)],
)
async def test_a_status_becomes_its_exception(client: AsyncClient, code: str, error: type[sdk.BranchlineError]) -> None:
    with pytest.raises(error, match="as the test asked") as caught:
        await client.complete(prompt=f"!CODE {code}")
    assert caught.value.code == code


async def test_a_server_that_breaks_the_contract(client: AsyncClient, server: FakeServer) -> None:
    server.script = Raw([gateway_pb2.GenerateResponse(text="x")])
    with pytest.raises(sdk.ServerError, match="without a result"):
        await client.complete(prompt="x")


async def test_nobody_there() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(sdk.UnavailableError, match=r"127\.0\.0\.1:1"):
            await client.complete(prompt="x", timeout=10)
        assert await client.health(timeout=1) is False
        with pytest.raises(sdk.DeadlineExceededError, match="not ready within"):
            await client.wait_ready(timeout=0.3)


async def test_info_and_health(client: AsyncClient, server: FakeServer) -> None:
    assert (await client.info()).model == "fake"
    assert await client.health() is True
    server.serving = False
    try:
        assert await client.health() is False
        threading.Timer(0.3, setattr, [server, "serving", True]).start()
        await client.wait_ready(timeout=10)
    finally:
        server.serving = True


async def test_many_at_once(client: AsyncClient) -> None:
    prompts = [f"number {number}" for number in range(40)]
    results = await asyncio.gather(*(client.complete(prompt=prompt) for prompt in prompts))
    assert [result.text for result in results] == prompts


def test_a_client_may_be_made_outside_the_loop(server: FakeServer) -> None:
    client = AsyncClient(server.target)

    async def use() -> str:
        async with client:
            return (await client.complete(prompt="ab")).text

    assert asyncio.run(use()) == "ab"
