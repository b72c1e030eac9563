from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator

import pytest
from client_servicer import ScriptedGateway, ServerThread

from branchline import client as sdk
from branchline.client import AsyncClient, AsyncStream

pytestmark = pytest.mark.usefixtures("gateway")


@pytest.fixture
async def client(server: ServerThread) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


async def cancelled(gateway: ScriptedGateway) -> bool:
    return await asyncio.to_thread(gateway.cancelled.acquire, timeout=5)


async def drain(stream: AsyncStream) -> list[str]:
    return [chunk.text async for chunk in stream]


async def test_complete_returns_everything(client: AsyncClient, gateway: ScriptedGateway) -> None:
    result = await client.complete(token_ids=[1, 2], seed=3)
    assert (result.text, result.token_ids, result.finish_reason, result.seed) == (".", (), "stop", 3)
    assert list(gateway.requests[0].token_ids.ids) == [1, 2]


async def test_generate_streams(client: AsyncClient) -> None:
    stream = client.generate(prompt="añ")
    with pytest.raises(RuntimeError, match="not come to its end"):
        _ = stream.result
    assert [(chunk.text, chunk.token_ids) async for chunk in stream] == [("a", (97,)), ("ñ", (241,)), (".", ())]
    assert stream.result.text == "añ."
    assert 0 < stream.result.time_to_first_token_s <= stream.result.duration_s < 10


async def test_samples_and_logprobs(client: AsyncClient) -> None:
    stream = client.generate(prompt="ab", n=2, logprobs=1)
    parts = [(chunk.sample, chunk.text, len(chunk.logprobs), chunk.finish_reason) async for chunk in stream]
    assert parts[:4] == [(0, "a", 1, None), (1, "b", 1, None), (0, "b", 1, None), (1, "c", 1, None)]
    assert parts[4:] == [(1, ".", 0, "stop"), (0, ".", 0, "stop")]
    result = await client.complete(prompt="ab", n=2, logprobs=1)
    assert [sample.text for sample in result.samples] == ["ab.", "bc."]
    assert [sample.logprobs for sample in stream.result.samples] == [sample.logprobs for sample in result.samples]
    assert result.samples[1].logprobs[1].top == ((99, -1.0),)


class TestCancellation:
    async def test_leaving_the_loop(self, client: AsyncClient, gateway: ScriptedGateway) -> None:
        async for _ in client.generate(prompt="!wait"):
            break
        gc.collect()
        assert await cancelled(gateway)

    async def test_leaving_the_block(self, client: AsyncClient, gateway: ScriptedGateway) -> None:
        async with client.generate(prompt="!wait") as stream:
            await anext(stream)
        assert await cancelled(gateway)

    async def test_cancelling_the_task(self, client: AsyncClient, gateway: ScriptedGateway) -> None:
        task = asyncio.create_task(client.complete(prompt="!wait"))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled(gateway)

    async def test_a_timeout_of_asyncio(self, client: AsyncClient, gateway: ScriptedGateway) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.complete(prompt="!wait")
        assert await cancelled(gateway)

    async def test_close_from_another_task(self, client: AsyncClient, gateway: ScriptedGateway) -> None:
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
        assert await cancelled(gateway)

    async def test_closing_the_client(self, server: ServerThread, gateway: ScriptedGateway) -> None:
        client = AsyncClient(server.target)
        stream = client.generate(prompt="!wait")
        await anext(stream)
        reader = asyncio.create_task(drain(stream))
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(sdk.CancelledError):
            await reader
        assert await cancelled(gateway)
        with pytest.raises(sdk.BranchlineError, match="the client is closed"):
            await client.complete(prompt="x")
        await client.close()


async def test_the_deadline(client: AsyncClient, gateway: ScriptedGateway) -> None:
    with pytest.raises(sdk.DeadlineExceededError):
        await client.complete(prompt="!wait", timeout=0.3)
    assert await cancelled(gateway)


@pytest.mark.parametrize(
    ("code", "error"),
    [("INVALID_ARGUMENT", sdk.InvalidRequestError), ("RESOURCE_EXHAUSTED", sdk.OverloadedError)],
)
async def test_a_status_becomes_its_exception(client: AsyncClient, code: str, error: type[sdk.BranchlineError]) -> None:
    with pytest.raises(error, match="as you wish") as caught:
        await client.complete(prompt=f"!CODE {code}")
    assert caught.value.code == code


async def test_a_server_that_breaks_the_contract(client: AsyncClient) -> None:
    with pytest.raises(sdk.ServerError, match="without a result"):
        await client.complete(prompt="!unfinished")


async def test_nobody_there() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(sdk.UnavailableError, match=r"127\.0\.0\.1:1"):
            await client.complete(prompt="x", timeout=10)
        assert await client.health(timeout=1) is False
        with pytest.raises(sdk.DeadlineExceededError, match="not ready within"):
            await client.wait_ready(timeout=0.3)


async def test_info_and_health(client: AsyncClient, server: ServerThread) -> None:
    assert (await client.info()).model == "tiny"
    assert await client.health() is True
    server.set_serving(False)
    try:
        assert await client.health() is False
        threading.Timer(0.3, server.set_serving, [True]).start()
        await client.wait_ready(timeout=10)
    finally:
        server.set_serving(True)


async def test_many_at_once(client: AsyncClient) -> None:
    prompts = [f"number {number}" for number in range(40)]
    results = await asyncio.gather(*(client.complete(prompt=prompt) for prompt in prompts))
    assert [result.text for result in results] == [f"{prompt}." for prompt in prompts]


def test_a_client_may_be_made_outside_the_loop(server: ServerThread) -> None:
    client = AsyncClient(server.target)

    async def use() -> str:
        async with client:
            return (await client.complete(prompt="ab")).text

    assert asyncio.run(use()) == "ab."
