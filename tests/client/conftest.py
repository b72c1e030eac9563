from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest
from client_servicer import ScriptedGateway, ServerThread


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread().running() as server:
        yield server


@pytest.fixture
def gateway(server: ServerThread) -> Iterator[ScriptedGateway]:
    """Fresh counters; afterwards no call may be left, and cancellations must all have been expected."""
    server.gateway.requests.clear()
    yield server.gateway
    end = time.monotonic() + 5
    while server.gateway.running and time.monotonic() < end:
        gc.collect()  # a stream that was dropped unfinished is cancelled when it is collected
        time.sleep(0.01)
    assert server.gateway.running == 0
    assert not server.gateway.cancelled.acquire(blocking=False)
