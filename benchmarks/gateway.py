"""What the gateway costs: the latency that it adds to a message, the messages that a core relays, and 500 streams.

    python -m benchmarks.gateway --out benchmarks/results/gateway-cpu.json

The gateway is the real one, in a process of its own, between a source that computes nothing (`gateway_source`) and
clients in this process, which read such streams straight from the source, too, in the same run: what that takes is
taken off. Messages carry one token each. Processor time is what the kernel has counted for the gateway's process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gateway_load import WAYS, Load, Targets, ages
from benchmarks.gateway_source import CAPACITY
from benchmarks.local_system import REPOSITORY, Process
from benchmarks.machine import facts
from branchline.client import Client
from branchline.config import Config
from branchline.engine.models.locate import locate_model
from gateway.tokens import Tokens

START_S = 120.0

#: Light enough that nothing queues; as fast as messages go through; and many streams.
CASES = {"latency": Load(8, 200, 20), "rate": Load(8, 3000), "crowd": Load(500, 30, 2)}


def plain_ids() -> list[int]:
    """Tokens of the default model whose text is plain, so that each message shows some."""
    with contextlib.closing(Tokens.load(locate_model("default"))) as tokens:
        texts = ((token_id, tokens.decode([token_id])) for token_id in range(tokens.vocab_size))
        return [token_id for token_id, text in texts if text and text.isascii() and text.isprintable()]


@contextlib.contextmanager
def system(ids: Sequence[int]) -> Iterator[tuple[Targets, Process]]:
    """A source and a gateway in front of it, the gateway's process beside their addresses."""
    with tempfile.TemporaryDirectory(prefix="branchline-") as name:
        directory = Path(name)
        (directory / "ids.json").write_text(json.dumps(list(ids)))
        command = [sys.executable, "-m", "benchmarks.gateway_source", str(directory / "ids.json")]
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as source:
            assert source.stdout is not None
            address = source.stdout.readline().strip()
            settings = dataclasses.replace(
                Config().gateway,
                http_port=0,
                prefill_workers=(address,),
                decode_workers=(address,),
                max_requests=CAPACITY,
                max_tokens_limit=1 << 19,
            )
            gateway = Process("gateway", dataclasses.replace(Config(), gateway=settings), directory, "gateway")
            try:
                target = gateway.address(START_S)
                yield Targets(address, target, gateway.http), gateway
            finally:
                gateway.stop()


def processor_s(pid: int) -> float:
    """User and system time of a process so far, in steps of the kernel's clock (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(
    targets: Targets, pid: int, loads: Mapping[str, Load], rounds: int, positions: Mapping[int, int]
) -> dict[str, list[dict[str, Any]]]:
    """Rounds of each case, each with every way in turn; one in the beginning is left out."""
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in loads}
    for case, load in loads.items():
        for number in range(rounds + 1):
            one: dict[str, Any] = {}
            for way in WAYS:
                began, used = time.perf_counter(), processor_s(pid)
                late = sorted(await ages(way, targets, load, positions))
                seconds, used = time.perf_counter() - began, processor_s(pid) - used
                sent = load.streams * load.messages
                one[way] = {
                    "p50_ms": late[len(late) // 2] * 1e3,
                    "p99_ms": late[len(late) * 99 // 100] * 1e3,
                    "messages_s": sent / seconds,
                    "messages_core_s": None if way == "straight" else sent / used,
                }
            if number:
                found[case].append(one)
    return found


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and what a way adds to reading straight from the source in the same round."""
    rows = {}
    for way in WAYS:
        row = {
            name: round(statistics.median(one[way][name] for one in rounds), 3)
            for name in ("p50_ms", "p99_ms", "messages_s", "messages_core_s")
            if rounds[0][way][name] is not None
        }
        for name in ("p50_ms", "p99_ms"):
            row[f"added_{name}"] = round(statistics.median(one[way][name] - one["straight"][name] for one in rounds), 3)
        rows[way] = row
    return rows


def show(case: str, load: Load, rows: Mapping[str, Mapping[str, float]]) -> None:
    pace = f"{load.rate} messages/s each" if load.rate else "as fast as they come"
    print(f"{case}: {load.streams} streams of {load.messages} messages, {pace}")
    for way, row in rows.items():
        if load.rate:
            print(f"  {way:<9} p50 {row['p50_ms']:7.2f} ms (+{row['added_p50_ms']:.2f})   "
                  f"p99 {row['p99_ms']:7.2f} ms (+{row['added_p99_ms']:.2f})")  # fmt: skip
        elif "messages_core_s" in row:
            print(f"  {way:<9} {row['messages_core_s']:7.0f} messages per core-second, {row['messages_s']:7.0f}/s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the gateway costs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the messages in a stream")
    parser.add_argument("--streams", type=float, default=1.0, help="of the streams")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    ids = plain_ids()
    positions = {token_id: position for position, token_id in enumerate(ids)}
    loads = {
        case: Load(
            max(1, round(load.streams * options.streams)), max(4, round(load.messages * options.scale)), load.rate
        )
        for case, load in CASES.items()
    }
    with system(ids) as (targets, gateway):
        found = asyncio.run(measure(targets, gateway.popen.pid, loads, options.rounds, positions))
        with Client(targets.grpc) as client:
            left = len(client.status().requests)
    results = {case: summary(rounds) for case, rounds in found.items()}
    for case, rows in results.items():
        show(case, loads[case], rows)
    print(f"requests left in the gateway: {left}")
    if options.out is not None:
        settings = {case: dataclasses.asdict(load) for case, load in loads.items()} | {"rounds": options.rounds}
        result = {"machine": facts(), "settings": settings, "results": results, "requests_left": left}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
