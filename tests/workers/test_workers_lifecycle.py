"""Cancellation, leaks, engine failures, start and stop."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
import yaml
from worker_driver import Driver, Tiny, code_of, connected, eventually, running, running_workers

import decode_worker.serve
import prefill_worker.serve
from branchline.config import to_mapping
from branchline.engine.decode import DecodeRunner
from branchline.engine.prefill import PrefillRunner
from branchline.wire.server import PortInUseError

pytestmark = pytest.mark.wire

ROOT = Path(__file__).parents[2]
#: What the gateway may be told of a worker that stops: it tries again.
ENDED = (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_a_gateway_that_goes_away_in_mid_stream_frees_everything(workers: Driver) -> None:
    request = workers.request((3, 1, 4), 400)
    lease = await workers.reserve(request)
    stream = await workers.attach(lease.lease_id, request)
    async for _ in workers.start_prefill(request, lease):
        pass
    for _ in range(3):
        await stream.read()
    _, status = await workers.status()
    assert (status.running, status.tasks) == (1, 1)
    stream.cancel()
    await workers.wait_until_idle(1.0)


async def test_a_prefill_that_is_cancelled_between_chunks_frees_everything(workers: Driver) -> None:
    request = workers.request((1,) * 500, 8)
    lease = await workers.reserve(request)
    stream = await workers.attach(lease.lease_id, request)
    call = workers.start_prefill(request, lease)
    await asyncio.sleep(0.03)
    prefill, decode = await workers.status()
    assert prefill.queued == 1
    assert decode.leases == 1
    call.cancel()
    stream.cancel()
    await workers.wait_until_idle(1.0)


async def test_nothing_leaks_from_many_requests_with_a_third_cancelled(workers: Driver) -> None:
    generator = random.Random(5)
    slots = asyncio.Semaphore(4)

    async def one(number: int) -> None:
        prompt = tuple(generator.randrange(80) for _ in range(generator.randrange(1, 60)))
        request = workers.request(prompt, generator.randrange(1, 30))
        async with slots:
            if number % 3:
                outcome = await workers.complete(request)
                assert len(outcome.token_ids) == request.max_tokens
                return
            task = asyncio.create_task(workers.complete(request))
            await asyncio.wait({task}, timeout=generator.random() * 0.08)
            task.cancel()
            await asyncio.wait({task})

    await asyncio.gather(*(one(number) for number in range(90)))
    await workers.wait_until_idle(1.0)


async def test_a_step_that_fails_aborts_the_running_and_the_worker_goes_on(
    workers: Driver, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = workers.request((3, 1, 4), 200)
    with monkeypatch.context() as broken:
        broken.setattr(DecodeRunner, "step", _raise)
        lease = await workers.reserve(request)
        stream = await workers.attach(lease.lease_id, request)
        async for _ in workers.start_prefill(request, lease):
            pass
        assert (await stream.read()).tokens.index == 0
        assert await code_of(stream.read()) is grpc.StatusCode.ABORTED
    with monkeypatch.context() as broken:
        broken.setattr(PrefillRunner, "advance_many", _raise)
        lease = await workers.reserve(request)
        assert await code_of(workers.start_prefill(request, lease)) is grpc.StatusCode.ABORTED
        await workers.abort(lease)
    outcome = await workers.complete(workers.request((3, 1, 4), 8))
    assert tuple(outcome.token_ids) == tiny.greedy((3, 1, 4), 8)


async def test_an_engine_that_keeps_failing_ends_its_worker(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = _fail_three_times(tiny, monkeypatch)
    with pytest.raises(RuntimeError, match="a broken engine"):
        await failing


async def _fail_three_times(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_workers(tiny.config()) as workers:
        monkeypatch.setattr(DecodeRunner, "step", _raise)
        for _ in range(3):
            request = workers.request((3, 1, 4), 200)
            lease = await workers.reserve(request)
            stream = await workers.attach(lease.lease_id, request)
            async for _ in workers.start_prefill(request, lease):
                pass
            await stream.read()
            assert await code_of(stream.read()) is grpc.StatusCode.ABORTED

        async def gone() -> bool:
            try:
                await workers.status()
            except grpc.aio.AioRpcError:
                return True
            return False

        await eventually(gone, 10, lambda: "it still answers, though nobody has told it to stop")


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_stopping_ends_what_runs(tiny: Tiny, role: str) -> None:
    """A worker is stopped in the middle of a request: `serve` returns (it asserts that no block is left), the
    gateway is told, and the other worker is soon idle."""
    slow = tiny.config(**{"engine.prefill_chunk_tokens": 1})
    async with AsyncExitStack() as prefill, AsyncExitStack() as decode:
        addresses = [
            await prefill.enter_async_context(running(prefill_worker.serve.serve, slow)),
            await decode.enter_async_context(running(decode_worker.serve.serve, tiny.config())),
        ]
        async with connected(*addresses) as workers:
            request = workers.request((1,) * 500, 8)
            lease = await workers.reserve(request)
            stream = await workers.attach(lease.lease_id, request)
            call = workers.start_prefill(request, lease)
            await asyncio.sleep(0.02)
            if role == "prefill":
                await prefill.aclose()
                assert await code_of(call) in ENDED
                stream.cancel()
                await eventually(workers.decode_idle, 1.0, lambda: "leases are left")
            else:
                await decode.aclose()
                assert await code_of(stream.read()) in ENDED
                assert await code_of(call) in ENDED
                await eventually(workers.prefill_idle, 1.0, lambda: "jobs are left")


async def test_a_busy_port_is_named(tiny: Tiny) -> None:
    async with running(decode_worker.serve.serve, tiny.config()) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(PortInUseError, match=str(port)):
            async with running(decode_worker.serve.serve, tiny.config(**{"decode.port": port})):
                pass


def spawn(role: str, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", role, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


@pytest.mark.parametrize("role", ["prefill_worker", "decode_worker"])
def test_the_process_serves_until_it_is_told_to_end(tiny: Tiny, tmp_path: Path, role: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_mapping(tiny.config())))
    process = spawn(role, "--config", str(file))
    try:
        line = process.stdout.readline() if process.stdout else ""
        assert line.startswith("ready grpc=127.0.0.1:"), line
        host, _, port = line.strip().removeprefix("ready grpc=").rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        busy = spawn(role, "--config", str(file), "--set", f"{role.removesuffix('_worker')}.port={port}")
        _, errors = busy.communicate(timeout=60)
        assert busy.returncode == 2
        assert errors.splitlines()[-1] == f"error: port {port} on 127.0.0.1 is in use by another process"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=5)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--set", "model.dtype=float8"], "model.dtype: must be one of"),
        (["--set", "model.dtyp=float32"], "model.dtyp: unknown field"),
        (["--set", "nonsense"], "--set nonsense: must be SECTION.FIELD=VALUE"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["--set", "model.model=/nowhere", "--set", "model.provider=reference"], "/nowhere"),
        (["--set", "model.tree=[[0],[1,1]]"], "model.tree"),
    ],
    ids=str,
)
def test_a_wrong_configuration_ends_the_process_with_one_line(flags: list[str], error: str) -> None:
    process = spawn("decode_worker", *flags)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: ")
    assert error in errors.splitlines()[-1]


def _raise(*_: object) -> None:
    raise RuntimeError("a broken engine")
