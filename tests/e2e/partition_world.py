"""Workers in network namespaces of their own, between any two of which the network can be cut.

Run it with `unshare --map-root-user --net`: all of it, the gateway and the clients too, is in namespaces that end with
it. Prints what happened; exit code 0 when all that is asserted here holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from e2e_helpers import START_S, Options, Streamed, complete_all, wait_until, wait_until_idle

from benchmarks.local_system import Process
from branchline.client import Client, DeadlineExceededError, UnavailableError
from branchline.config import load

GATEWAY = "10.77.0.1"
#: An Ethernet address that nobody has: what is sent there is lost, as behind a firewall that drops.
NOWHERE = "02:00:00:00:00:01"
SHORT: Options = {"prompt": "a bad cab", "max_tokens": 60, "ignore_eos": True}
LONG: Options = {"prompt": "fade a lamb ", "max_tokens": 1500, "ignore_eos": True}
#: Of many chunks.
LONG_PROMPT: Options = {"prompt": "in a dimmed den " * 110, "max_tokens": 20, "ignore_eos": True}


def ip(*words: str, inside: Host | None = None) -> None:
    subprocess.run([*(inside.prefix if inside else ()), "ip", *words], check=True, timeout=10)


@dataclass(frozen=True)
class Host:
    """A namespace: the process that keeps it, and its address on the bridge."""

    keeper: int
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self.keeper), "--net")

    def cut_from(self, other: Host) -> None:
        for one, two in ((self, other), (other, self)):
            ip("neigh", "replace", two.address, "lladdr", NOWHERE, "dev", "eth0", "nud", "permanent", inside=one)

    def join(self, other: Host) -> None:
        for one, two in ((self, other), (other, self)):
            ip("neigh", "del", two.address, "dev", "eth0", inside=one)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    ip("link", "set", "lo", "up")
    ip("link", "add", "br0", "type", "bridge")
    ip("addr", "add", f"{GATEWAY}/24", "dev", "br0")
    ip("link", "set", "br0", "up")
    with contextlib.ExitStack() as stack:
        made = []
        for number in range(2, count + 2):
            keeper = stack.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "600"]))
            stack.callback(keeper.kill)
            host = Host(keeper.pid, f"10.77.0.{number}")
            link = Path(f"/proc/{keeper.pid}/ns/net")
            wait_until(lambda link=link: link.readlink() != Path("/proc/self/ns/net").readlink(), 10, "a namespace")
            ip("link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", str(host.keeper))
            ip("link", "set", f"v{number}", "master", "br0", "up")
            ip("addr", "add", f"{host.address}/24", "dev", "eth0", inside=host)
            for device in ("lo", "eth0"):
                ip("link", "set", device, "up", inside=host)
            made.append(host)
        yield made


def check(client: Client, prefill: Host, first: Host, second: Host) -> None:
    short, long, long_prompt = [client.complete(**options) for options in (SHORT, LONG, LONG_PROMPT)]

    def same_as_ever() -> int:
        answers = complete_all(client, [SHORT] * 4 + [LONG_PROMPT] * 2)
        assert [a.token_ids for a in answers] == [short.token_ids] * 4 + [long_prompt.token_ids] * 2
        return sum(answer.failovers for answer in answers)

    assert same_as_ever() == 0
    prefill.cut_from(first)
    began = time.monotonic()
    print(f"one of two cut: {same_as_ever()} failovers, {time.monotonic() - began:.1f} s")

    with ThreadPoolExecutor(4) as pool:
        # One runs where it is, and needs no prefill any more; the other is cut off while it is handed over.
        streams = [Streamed(client, options) for options in (LONG, LONG_PROMPT)]
        running = pool.submit(streams[0].run)
        wait_until(lambda: len(streams[0].token_ids) > 10, 30, "a stream runs")
        handed_over = pool.submit(streams[1].run)
        wait_until(lambda: any(w.role == "prefill" and w.requests for w in client.info().workers), 30, "it is there")
        prefill.cut_from(second)
        began = time.monotonic()
        try:
            client.complete(**SHORT, timeout=8.0)
            raise AssertionError("there was no way to a decode worker")
        except (UnavailableError, DeadlineExceededError) as error:
            print(f"both cut: {type(error).__name__} after {time.monotonic() - began:.1f} s: {error}")
        assert time.monotonic() - began < 8 + 5
        assert running.result(60).token_ids == long.token_ids
        prefill.join(first)
        prefill.join(second)
        try:
            assert handed_over.result(90).token_ids == long_prompt.token_ids
            print("the request that was handed over went on")
        except UnavailableError as error:
            print(f"the request that was handed over ended: {error}")
    began = time.monotonic()
    wait_until(lambda: all(worker.healthy for worker in client.info().workers), 30, "all are well again")
    same_as_ever()
    print(f"healed: all as ever after {time.monotonic() - began:.1f} s")
    wait_until_idle(client, 10.0)


def main(path: str) -> None:
    base = load(path)
    with hosts(3) as made, tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        processes: dict[str, list[Process]] = {"prefill": [], "decode": []}
        for role, host in zip(("prefill", "decode", "decode"), made, strict=True):
            config = base.override(**{f"{role}.host": host.address})
            process = Process(f"{role}_worker", config, Path(directory), f"{role}-{host.address}", host.prefix)
            stack.callback(process.stop)
            processes[role].append(process)
        addresses = {f"{role}_workers": tuple(p.address(START_S) for p in ps) for role, ps in processes.items()}
        config = dataclasses.replace(base, gateway=dataclasses.replace(base.gateway, host=GATEWAY, **addresses))
        gateway = Process("gateway", config, Path(directory), "gateway")
        stack.callback(gateway.stop)
        with Client(gateway.address(START_S), retries=0) as client:
            check(client, *made)
            assert [process.stop() for process in (gateway, *processes["prefill"], *processes["decode"])] == [0] * 4


if __name__ == "__main__":
    main(sys.argv[1])
