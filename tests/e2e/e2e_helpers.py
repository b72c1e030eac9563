"""A system of real processes whose workers can be killed, frozen and started again; streams that check themselves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.local_system import LocalSystem, Process
from branchline.client import Client, Completion, ServerInfo, Worker
from branchline.config import Config

#: No request of these tests may take longer, on a machine that is busy with others.
REQUEST_S = 90.0
START_S = 120.0

Options = dict[str, Any]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.02)


def in_use(info: ServerInfo) -> list[Worker]:
    """The workers that hold something, of those that answer."""
    return [worker for worker in info.workers if worker.blocks_used or worker.requests or worker.tasks]


def wait_until_idle(client: Client, timeout_s: float = 5.0) -> None:
    """Neither the gateway nor a worker that answers holds anything any more."""
    deadline = time.monotonic() + timeout_s
    while (info := client.info()).active_requests or in_use(info):
        assert time.monotonic() < deadline, f"still in use after {timeout_s:g} s: {info}"
        time.sleep(0.02)


@dataclass
class Streamed:
    """One request, read chunk by chunk; `token_ids` can be watched while it runs."""

    client: Client
    options: Options
    token_ids: list[int] = field(default_factory=list)

    def run(self) -> Completion:
        """Reads all of it. The chunks must add up to the result, and to the usage that the gateway has counted."""
        text = ""
        with self.client.generate(timeout=REQUEST_S, **self.options) as stream:
            for chunk in stream:
                self.token_ids += chunk.token_ids
                text += chunk.text
        result = stream.result
        assert (result.text, list(result.token_ids)) == (text, self.token_ids)
        assert result.usage.completion_tokens == len(self.token_ids)
        return result


def complete_all(client: Client, requests: Sequence[Options]) -> list[Completion]:
    """All at once, each streamed."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda options: Streamed(client, options).run(), requests))


def complete_disturbed(
    client: Client, requests: Sequence[Options], disturb: Callable[[], None], after_tokens: int = 10
) -> list[Completion]:
    """All at once; `disturb` is called when every one of them has got some tokens."""
    streams = [Streamed(client, options) for options in requests]
    with ThreadPoolExecutor(len(streams)) as pool:
        running = [pool.submit(stream.run) for stream in streams]
        wait_until(lambda: all(len(s.token_ids) >= after_tokens for s in streams), REQUEST_S, "all streams run")
        assert not any(future.done() for future in running), "a stream ended before it could be disturbed"
        disturb()
        return [future.result(REQUEST_S) for future in running]


class Fleet:
    """A LocalSystem; its workers are named by their addresses, which they keep when they are started again."""

    def __init__(self, system: LocalSystem, client: Client, config: Config, directory: Path) -> None:
        self.client = client
        self._system = system
        self._config = config
        self._directory = directory
        self._frozen: set[str] = set()
        self._starts = 0

    @property
    def http(self) -> str:
        """The gateway's HTTP API, HOST:PORT."""
        return self._system.http

    @property
    def by_role(self) -> dict[str, Process]:
        """The gateway, and the first worker of each role."""
        assert self._system.gateway is not None
        return {"gateway": self._system.gateway, "prefill": self._system.prefill[0], "decode": self._system.decode[0]}

    @property
    def processes(self) -> dict[str, Process]:
        """By address: the gateway lists its workers in the order of its configuration."""
        workers = self.client.info().workers
        return dict(zip((w.address for w in workers), self._system.prefill + self._system.decode, strict=True))

    def busiest(self, role: str) -> Worker:
        """The worker of a role that has the most requests now."""
        return max((w for w in self.client.info().workers if w.role == role), key=lambda worker: worker.requests)

    def kill(self, address: str) -> None:
        process = self.processes[address].popen
        process.kill()
        process.wait(10)

    def freeze(self, address: str) -> None:
        self._frozen.add(address)
        os.kill(self.processes[address].popen.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for address in self._frozen:
            os.kill(self.processes[address].popen.pid, signal.SIGCONT)
        self._frozen.clear()

    def revive(self) -> None:
        """Starts dead workers again where they were, and waits until all are well and idle."""
        self.restart()
        wait_until_idle(self.client)

    def restart(self) -> None:
        """Starts dead workers again where they were, and waits until all are well; they may have work by then."""
        self.thaw()
        for role, processes in (("prefill", self._system.prefill), ("decode", self._system.decode)):
            addresses = [worker.address for worker in self.client.info().workers if worker.role == role]
            for index, address in enumerate(addresses):
                if processes[index].popen.poll() is not None:
                    processes[index] = self._start(role, address)
        wait_until(lambda: all(w.healthy for w in self.client.info().workers), 10, "all workers are well")

    def _start(self, role: str, address: str) -> Process:
        self._starts += 1
        config = self._config.override(**{f"{role}.port": int(address.rpartition(":")[2])})
        process = Process(f"{role}_worker", config, self._directory, f"{role}-again-{self._starts}")
        assert process.address(START_S) == address
        return process


@contextmanager
def running_fleet(config: Config, directory: Path) -> Iterator[Fleet]:
    """Starts everything; in the end everything must be idle and every process that still runs stop cleanly."""
    with LocalSystem(config, START_S) as system, Client(system.address) as client:
        fleet = Fleet(system, client, config, directory)
        try:
            yield fleet
        finally:
            fleet.thaw()
        wait_until_idle(client)
        alive = [process for process in system.processes if process.popen.poll() is None]
        assert [process.stop() for process in alive] == [0] * len(alive)
