"""A whole gateway, from its configuration to its stop; in this process and in one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx2
import pytest
import yaml
from gateway_harness import PROMPT
from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually, expected_tokens, running
from tiny_tokenizer import train

from branchline.config import Config, ConfigError, from_mapping, to_mapping
from branchline.core import Fingerprint, InvalidRequestError
from branchline.engine.models.errors import ModelError
from branchline.v1 import gateway_pb2, gateway_pb2_grpc
from branchline.wire.channels import open_channel
from branchline.wire.server import PortInUseError
from gateway.pool import WorkerPool, WorkersNotReadyError
from gateway.serve import serve
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    train().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 480, "eos_token_id": 0}))
    return str(directory)


def config(
    model: str,
    *,
    prefill: str = "",
    decode: str = "",
    port: int = 0,
    http_port: int = -1,
    start_timeout_s: float = 20.0,
    **settings: object,
) -> Config:
    gateway = {
        "prefill_workers": [prefill] if prefill else [],
        "decode_workers": [decode] if decode else [],
        "grpc_port": port,
        "http_port": http_port,
        **settings,
    }
    return from_mapping({"model": {"model": model}, "gateway": gateway, "ray": {"start_timeout_s": start_timeout_s}})


@contextlib.asynccontextmanager
async def worker_addresses(**decode: object) -> AsyncIterator[dict[str, str]]:
    async with running(ScriptedPrefill()) as (_, p), running(ScriptedDecode(**decode)) as (_, d):
        yield {"prefill": p, "decode": d}


async def generated(address: str) -> list[int]:
    async with open_channel(address) as channel:
        request = gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(ids=PROMPT), max_tokens=5)
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        return [token async for response in stub.Generate(request, timeout=10) for token in response.token_ids]


async def test_serves_until_stopped(model: str) -> None:
    before = asyncio.all_tasks()
    addresses: list[str] = []
    stop = asyncio.Event()
    async with worker_addresses() as workers:
        task = asyncio.create_task(serve(config(model, **workers), ready=addresses.append, stop=stop))
        await eventually(lambda: addresses or task.done(), 20)
        assert await generated(addresses[0]) == expected_tokens(PROMPT, 5)
        with pytest.raises(PortInUseError):
            await serve(
                config(model, **workers, port=int(addresses[0].rpartition(":")[2])),
                ready=addresses.append,
                stop=asyncio.Event(),
            )
        stop.set()
        await asyncio.wait_for(task, 5)
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection("127.0.0.1", int(addresses[0].rpartition(":")[2]))
    assert not [task for task in asyncio.all_tasks() - before if task.get_name().startswith(("watch", "Attach"))]


async def test_http_beside_grpc(model: str) -> None:
    """Two addresses; both ports are closed in the end, and one that is taken is told."""
    ready: list[tuple[str, ...]] = []
    stop = asyncio.Event()
    async with worker_addresses() as workers:
        served = serve(config(model, **workers, http_port=0), ready=lambda *all_: ready.append(all_), stop=stop)
        task = asyncio.create_task(served)
        await eventually(lambda: ready or task.done(), 30)
        grpc_address, http_address = ready[0]
        assert await generated(grpc_address) == expected_tokens(PROMPT, 5)
        async with httpx2.AsyncClient(base_url=f"http://{http_address}", trust_env=False) as client:
            body = {"model": "scripted", "prompt": list(PROMPT), "max_tokens": 5, "return_token_ids": True}
            answer = (await client.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["token_ids"] == expected_tokens(PROMPT, 5)
            port = int(http_address.rpartition(":")[2])
            with pytest.raises(PortInUseError, match=str(port)):
                await serve(config(model, **workers, http_port=port), ready=lambda *_: None, stop=asyncio.Event())
            stop.set()  # while a connection is open
            await asyncio.wait_for(task, 10)
        for address in ready[0]:
            with pytest.raises(OSError, match="Connect call failed"):
                await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))


async def test_a_stream_under_a_stop_ends_with_an_error(model: str) -> None:
    ready: list[tuple[str, ...]] = []
    stop = asyncio.Event()
    async with worker_addresses(pace_s=0.05) as workers:
        served = serve(config(model, **workers, http_port=0), ready=lambda *all_: ready.append(all_), stop=stop)
        task = asyncio.create_task(served)
        await eventually(lambda: ready or task.done(), 30)
        async with httpx2.AsyncClient(base_url=f"http://{ready[0][1]}", trust_env=False) as client:
            body = {"model": "scripted", "prompt": list(PROMPT), "max_tokens": 200, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = [line async for line in _until_stopped(response, stop)]
        assert "the gateway is stopping" in lines[-2]
        assert lines[-1] == "data: [DONE]"
        await asyncio.wait_for(task, 10)


async def _until_stopped(response: httpx2.Response, stop: asyncio.Event) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        stop.set()
        if line:
            yield line


async def test_a_parser_that_does_not_exist(model: str) -> None:
    with pytest.raises(ConfigError, match="nobody"):
        await serve(config(model, tool_parser="nobody"), ready=lambda _: None, stop=asyncio.Event())


async def test_stopping_ends_running_requests(model: str) -> None:
    addresses: list[str] = []
    stop = asyncio.Event()
    decode = ScriptedDecode(pace_s=0.5)
    async with running(ScriptedPrefill()) as (_, p), running(decode) as (_, d):
        task = asyncio.create_task(serve(config(model, prefill=p, decode=d), ready=addresses.append, stop=stop))
        await eventually(lambda: addresses or task.done(), 20)
        call = asyncio.create_task(generated(addresses[0]))
        await eventually(lambda: decode.leases)
        stop.set()
        await asyncio.wait_for(task, 5)
        assert isinstance((await asyncio.gather(call, return_exceptions=True))[0], Exception)
        await eventually(lambda: not decode.leases)


async def test_workers_may_come_later_and_from_another_thread(model: str) -> None:
    addresses: list[str] = []
    lines: list[str] = []
    pools: list[Mapping[str, WorkerPool]] = []
    stop = asyncio.Event()
    task = asyncio.create_task(
        serve(config(model), ready=addresses.append, stop=stop, progress=lines.append, on_pools=pools.append)
    )
    await eventually(lambda: any("waiting for" in line for line in lines), 20)
    async with worker_addresses() as workers:
        await asyncio.to_thread(pools[0][""].update, [workers["prefill"]], [workers["decode"]])
        await eventually(lambda: addresses, 5)
        assert await generated(addresses[0]) == expected_tokens(PROMPT, 5)
        stop.set()
        await asyncio.wait_for(task, 5)


async def test_stopped_before_workers_came(model: str) -> None:
    stop = asyncio.Event()
    stop.set()
    await asyncio.wait_for(serve(config(model), ready=lambda address: pytest.fail(address), stop=stop), 20)


async def test_workers_that_never_come(model: str) -> None:
    lines: list[str] = []
    with pytest.raises(WorkersNotReadyError, match=r"prefill worker 127\.0\.0\.1:1"):
        await serve(
            config(model, prefill="127.0.0.1:1", start_timeout_s=0.5),
            ready=lambda _: None,
            stop=asyncio.Event(),
            progress=lines.append,
        )
    assert lines[-1] == "gateway: waiting for prefill worker 127.0.0.1:1"


async def test_workers_that_do_not_fit(model: str) -> None:
    async with worker_addresses(fingerprint=Fingerprint(target={"weights": "w2"})) as workers:
        with pytest.raises(WorkersNotReadyError, match="differ in dtype"):
            await serve(config(model, **workers, start_timeout_s=1.0), ready=lambda _: None, stop=asyncio.Event())


async def test_an_address_that_is_none(model: str) -> None:
    with pytest.raises(InvalidRequestError, match="HOST:PORT, got 'nowhere'"):
        await serve(config(model, prefill="nowhere"), ready=lambda _: None, stop=asyncio.Event())


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 480}))
    with pytest.raises(ModelError, match="tokenizer can't be loaded"):
        Tokens.load(tmp_path)


async def start_process(path: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "gateway", "--config", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


async def test_a_process_of_its_own(model: str, tmp_path: Path) -> None:
    async with worker_addresses() as workers:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(to_mapping(config(model, **workers, http_port=0))))
        process = await start_process(path)
        try:
            line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
            assert line.startswith("ready grpc=127.0.0.1:")
            address, _, http = line.strip().removeprefix("ready grpc=").partition(" http=")
            assert await generated(address) == expected_tokens(PROMPT, 5)
            async with httpx2.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"http://{http}/health")).json() == {"status": "ok"}
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 15) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_a_wrong_configuration_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("gateway: {grpc_prot: 1}")
    process = await start_process(path)
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert stderr.decode().startswith("error: gateway.grpc_prot: unknown field")
    assert stderr.count(b"\n") == 1
