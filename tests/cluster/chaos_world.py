"""A system on several Ray nodes of this machine that can be struck, and streams that keep score."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from cluster_helpers import ROOT, wait_until
from ray_nodes import START_S, Node, ray_head, ray_worker

from branchline.client import Client, Completion, ServerInfo
from branchline.config import Config, to_mapping

HEAD_IP, NODE_IPS = "127.0.0.2", ("127.0.0.3", "127.0.0.4")
ROLES = ("prefill", "decode", "gateway")
#: One process of each role on each node; Ray's CPUs are tickets, not cores.
NODE_FLAGS = {"num-cpus": 3, "resources": json.dumps(dict.fromkeys(ROLES, 1)), "object-store-memory": 100 << 20}
NODE_ENV = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # several nodes
    "RAY_raylet_start_wait_time_s": "120",
    # A node that is gone is noticed in 3 s rather than 15.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "3000",
}
REQUEST_S = 120.0


class Cluster:
    """A head, which has the launcher, and nodes with one worker of each role and a gateway each."""

    def __init__(self, directory: Path, config: Config) -> None:
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._nodes: dict[str, tuple[contextlib.ExitStack, Node]] = {}
        self._config = directory / "config.yaml"
        self._config.write_text(yaml.safe_dump(to_mapping(config)))
        self._log = directory / "launcher.log"
        self._frozen: list[psutil.Process] = []
        self.gateways: list[str] = []

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as stack:
            flags = {"num-cpus": 1, "object-store-memory": 100 << 20}
            self._head = stack.enter_context(ray_head(self._directory, NODE_ENV, HEAD_IP, **flags))
            stack.callback(self._stop_nodes)
            for ip in NODE_IPS:
                self.start_node(ip)
            self._launcher = stack.enter_context(self._launched())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def freeze(self, address: str) -> None:
        """A process that is stopped, but for its sockets."""
        self._frozen.append(self.process(address))
        self._frozen[-1].suspend()

    def thaw(self) -> None:
        while self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._frozen.pop().resume()

    def _stop_nodes(self) -> None:
        self.thaw()  # a node waits for its processes to end
        for stack, _ in self._nodes.values():
            stack.close()

    def start_node(self, ip: str) -> None:
        stack = contextlib.ExitStack()
        self._nodes[ip] = stack, stack.enter_context(ray_worker(self._directory, self._head, ip, **NODE_FLAGS))

    def kill_node(self, ip: str) -> None:
        """All its processes at once, as when a machine fails."""
        stack, node = self._nodes.pop(ip)
        family = [psutil.Process(node.process.pid), *node.family()]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        stack.close()

    def process(self, address: str) -> psutil.Process:
        """The one that listens at an address; raises LookupError."""
        ip, _, port = address.rpartition(":")
        for member in self._nodes[ip][1].family() if ip in self._nodes else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                for connection in member.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN and connection.laddr.port == int(port):
                        return member
        raise LookupError(address)

    def info(self, gateway: str) -> ServerInfo | None:
        """None when it does not answer soon."""
        with Client(gateway, retries=0) as client, contextlib.suppress(Exception):
            return client.info(timeout=2)
        return None

    def healthy(self) -> dict[str, list[str]]:
        """Addresses by role: workers that every gateway finds well, and gateways that answer."""
        infos = {gateway: info for gateway in self.gateways if (info := self.info(gateway))}
        found = {"gateway": list(infos)}
        for role in ("prefill", "decode"):
            views = [{w.address for w in info.workers if w.role == role and w.healthy} for info in infos.values()]
            found[role] = sorted(set.intersection(*views)) if views else []
        return found

    @property
    def whole(self) -> bool:
        return all(len(addresses) == len(NODE_IPS) for addresses in self.healthy().values())

    def stop(self) -> int:
        """The launcher's exit code."""
        self._launcher.send_signal(signal.SIGTERM)
        return self._launcher.wait(60)

    @contextlib.contextmanager
    def _launched(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "cluster.launch", "--config", str(self._config)]
        command += ["--ray-address", self._head.gcs]
        with self._log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=self._head.env, stdout=output, stderr=subprocess.STDOUT)
        try:
            ready = ("ready grpc=", "gateway grpc=")
            wait_until(
                lambda: self._log.read_text().count(" grpc=") == len(NODE_IPS) or process.poll() is not None,
                START_S,
                "ready",
            )
            assert process.poll() is None
            lines = [line for line in self._log.read_text().splitlines() if line.startswith(ready)]
            self.gateways = [line.split("grpc=")[1].split()[0] for line in lines]
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)
            print(self._log.read_text())


@dataclass(frozen=True)
class Gap:
    """Nothing came for so long."""

    began: float
    seconds: float


@dataclass
class Caller:
    """Sends one request after the other, and checks each against its undisturbed answer."""

    targets: str
    requests: Sequence[dict[str, Any]]
    expected: Sequence[Completion]
    number: int
    until: float
    gaps: list[Gap] = field(default_factory=list)
    done: int = 0
    failovers: int = 0

    def run(self) -> None:
        with Client(self.targets, retries=10, timeout=REQUEST_S) as client:
            while time.monotonic() < self.until:
                self._one(client, (self.number + self.done) % len(self.requests))
                self.done += 1

    def _one(self, client: Client, which: int) -> None:
        token_ids: list[int] = []
        last = time.monotonic()
        with client.generate(**self.requests[which]) as stream:
            for chunk in stream:
                now = time.monotonic()
                self.gaps.append(Gap(last, now - last))
                last = now
                token_ids += chunk.token_ids
            result = stream.result
        assert tuple(token_ids) == tuple(result.token_ids) == tuple(self.expected[which].token_ids), which
        assert result.text == self.expected[which].text, which
        self.failovers += result.failovers
