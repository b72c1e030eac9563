from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from branchline.client import SpeculationStats
from branchline.client.testing import Answer, FakeServer, Fault, Pause, Reply, Request


def script(request: Request) -> Answer:
    """Each sample echoes the prompt, sample 1 with the next character of the alphabet, and so on. "!wait" stays behind
    that, "!CODE NAME" fails.
    """
    if request.prompt.startswith("!CODE "):
        return Fault(request.prompt.removeprefix("!CODE "))
    samples = range(max(1, request.options.n))
    if request.prompt == "!wait":
        return Reply([*"wait", Pause(60)])
    return [
        Reply(
            "".join(chr(ord(character) + sample) for character in request.prompt),
            cached_tokens=5,
            speculation=SpeculationStats(target_forwards=4, drafted=20, accepted=6),
            failovers=1,
            preemptions=2,
        )
        for sample in samples
    ]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """In the end no call may be left: what waits must have been cancelled."""
    with FakeServer(script) as server:
        yield server
        gc.collect()  # a stream that was dropped unfinished is cancelled when it is collected
        server.wait_idle()
