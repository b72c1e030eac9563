"""The SDK is light: in what it imports, in how long that takes, in what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from branchline.client import AsyncClient, Client
from branchline.client.testing import FakeServer

HEAVY = ("torch", "vllm", "ray", "transformers", "numpy", "yaml", "branchline.wire", "branchline.engine")


def test_the_import_is_quick_and_brings_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import branchline.client.testing; "
        f"print(time.perf_counter() - start, *[name for name in {HEAVY} if name in sys.modules])"
    )
    seconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        took, *heavy = done.stdout.split()
        assert not heavy
        seconds.append(float(took))
        if min(seconds) < 0.3:
            return
    raise AssertionError(f"importing branchline.client.testing takes {min(seconds):.2f} s")


def open_sockets() -> int:
    """TCP connections of this process."""
    links = (os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return sum(link.startswith("socket:") for link in links)


async def test_closed_clients_leave_no_connection(server: FakeServer) -> None:
    with Client(server.target) as client:
        client.complete(prompt="warm")
    async with AsyncClient(server.target) as aio:
        await aio.complete(prompt="warm")
    before = open_sockets()
    for _ in range(5):
        with Client(server.target) as client:
            client.complete(prompt="a")
        async with AsyncClient(server.target) as aio:
            await aio.complete(prompt="b")
    end = time.monotonic() + 10
    while open_sockets() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert open_sockets() <= before
