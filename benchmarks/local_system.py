"""A whole system of plain processes on loopback, started by hand: no Ray. For benchmarks and tests."""

from __future__ import annotations

import dataclasses
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import yaml

from branchline.config import Config, to_mapping

REPOSITORY = Path(__file__).parents[1]
READY = "ready grpc="


class ProcessFailedError(RuntimeError):
    """A process ended, or did not get ready in time; the message ends with its last lines."""


class Process:
    """One `python -m ROLE --config FILE`; its standard error goes to a log file. `prefix` is put before the command."""

    def __init__(self, role: str, config: Config, directory: Path, name: str, prefix: Sequence[str] = ()) -> None:
        path = directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(to_mapping(config)))
        self.name = name
        self.log = directory / f"{name}.log"
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [*prefix, sys.executable, "-m", role, "--config", str(path)],
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        #: The address of a gateway's HTTP API, once it is ready, if it serves one.
        self.http = ""
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def address(self, timeout_s: float) -> str:
        """Waits for the ready line; returns HOST:PORT. Raises ProcessFailedError."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise ProcessFailedError(f"{self.name}: not ready after {timeout_s:g} s\n{self.tail()}") from None
            if not line:
                raise ProcessFailedError(f"{self.name}: ended with {self.popen.wait(10)}\n{self.tail()}")
            if line.startswith(READY):
                address, _, self.http = line.removeprefix(READY).strip().partition(" http=")
                return address

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM, then SIGKILL after the timeout; returns the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait(10)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")


class LocalSystem:
    """Prefill workers, decode workers and a gateway; `address` is the gateway's. A context manager."""

    def __init__(self, config: Config, timeout_s: float = 300.0) -> None:
        """`config`'s replicas say how many; ports are always free ones."""
        self._config = config
        self._timeout_s = timeout_s
        self._directory = tempfile.TemporaryDirectory(prefix="branchline-")
        self.prefill: list[Process] = []
        self.decode: list[Process] = []
        self.gateway: Process | None = None
        self.address = ""

    def __enter__(self) -> LocalSystem:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def processes(self) -> list[Process]:
        gateway = [self.gateway] if self.gateway else []
        return gateway + self.prefill + self.decode

    @property
    def http(self) -> str:
        """The address of the gateway's HTTP API; empty if the configuration has none."""
        return self.gateway.http if self.gateway else ""

    def stop(self) -> list[int]:
        """Ends what runs, the gateway first; returns the exit codes in the order of `processes`."""
        codes = [process.stop() for process in self.processes]
        self._directory.cleanup()
        return codes

    def _start(self) -> None:
        for role, processes, replicas in (
            ("prefill_worker", self.prefill, self._config.prefill.replicas),
            ("decode_worker", self.decode, self._config.decode.replicas),
        ):
            for index in range(replicas):
                processes.append(self._process(role, self._config, f"{role}-{index}"))
        addresses = [[p.address(self._timeout_s) for p in processes] for processes in (self.prefill, self.decode)]
        settings = dataclasses.replace(
            self._config.gateway, prefill_workers=tuple(addresses[0]), decode_workers=tuple(addresses[1])
        )
        self.gateway = self._process("gateway", dataclasses.replace(self._config, gateway=settings), "gateway")
        self.address = self.gateway.address(self._timeout_s)

    def _process(self, role: str, config: Config, name: str) -> Process:
        return Process(role, config, Path(self._directory.name), name)
