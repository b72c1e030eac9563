"""The gateway's routing policies side by side on the same traces, over simulated workers in virtual time.

    python -m benchmarks.routing --out benchmarks/results/routing.json --plot benchmarks/results/routing.svg

Real are the gateway's pool, queue, placement, attempts, journal and policies, the messages, and the workers' books of
cached blocks. Simulated is what takes time: workers follow a cost model (`routing_workers.Costs`), and no bytes
travel. So the figures compare policies; they say nothing of a machine.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bars_svg import Panel, svg
from benchmarks.machine import facts
from benchmarks.routing_trace import SHAPES, Conversation, Turn, trace
from benchmarks.routing_workers import Cluster, Costs
from benchmarks.virtual_time import run
from branchline.config import ROUTINGS, GatewayConfig
from branchline.core import SamplingParams
from branchline.observe.tracing import NoTracer
from branchline.v1 import gateway_pb2
from gateway.backend import Backend
from gateway.detokenize import Detokenizer
from gateway.door import Call
from gateway.journal import JournalEntry
from gateway.metrics import Counts
from gateway.output import Output
from gateway.relay import Relay
from gateway.routing.policy import Policy
from gateway.sample import Sample
from gateway.watch import Watch
from gateway.worker import Role

#: Conversations a second for each shape of a trace: light, and near what the workers can do.
RATES = {"mixed": (6.0, 11.0), "one prompt": (10.0, 35.0), "unrelated": (12.0, 19.0)}
TIMEOUT_S = 600.0


@dataclass
class Tally:
    """Of the requests that came behind the warm-up."""

    ttft_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Gateway:
    """One gateway, its workers, and clients."""

    def __init__(self, policy: str, workers: tuple[int, int], costs: Costs, warm_up_s: float, seed: int) -> None:
        self.cluster = Cluster(costs, seed)
        settings = GatewayConfig(routing=policy, stall_timeout_s=TIMEOUT_S)
        self.backend = Backend(settings, block_size=costs.block_size, connect=self.cluster.connect)
        self.decisions_s = _timed(self.backend.policy)
        self.tally = Tally()
        self._workers = workers
        self._warm_up_s = warm_up_s
        self._watch = Watch(NoTracer(), Counts())
        self._requests = 0

    async def replay(self, conversations: Sequence[Conversation]) -> float:
        """Seconds until the last one has ended."""
        prefill, decode = (
            [f"{role}:{number + 1}" for number in range(count)]
            for role, count in zip(("prefill", "decode"), self._workers, strict=True)
        )
        self.backend.pool.update(prefill, decode)
        await asyncio.sleep(0)
        while not self.backend.pool.pairs().fitting:
            await self.backend.pool.wait_for_change(1.0)
        self._began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for conversation in conversations:
                group.create_task(self._converse(conversation))
        seconds = time.monotonic() - self._began
        await self.backend.close()
        assert self.backend.pool.in_flight == 0
        assert all(worker.blocks.used == 0 for worker in self.cluster.workers.values())
        return seconds

    async def _converse(self, conversation: Conversation) -> None:
        await asyncio.sleep(conversation.at)
        said = conversation.system
        for number, turn in enumerate(conversation.turns):
            if number:
                await asyncio.sleep(turn.think_s)
            session = conversation.name if len(conversation.turns) > 1 else ""
            said = await self._request((*said, *turn.says), turn, session)

    async def _request(self, prompt: tuple[int, ...], turn: Turn, session: str) -> tuple[int, ...]:
        """All tokens in the end."""
        self._requests += 1
        entry = JournalEntry(
            request_id=f"r{self._requests}",
            prompt=prompt,
            max_tokens=turn.answer_tokens,
            sampling=SamplingParams(),
            session=session,
            arrived=time.monotonic(),  # the default is the real clock's
        )
        self.cluster.contexts[entry.request_id] = entry
        first_at = 0.0

        async def write(_response: gateway_pb2.GenerateResponse) -> None:
            nonlocal first_at
            first_at = first_at or time.monotonic()

        output = Output(Detokenizer(lambda ids: "x" * len(ids)), ())
        with self._watch.request(Call("grpc", "Generate")) as watch:
            sample = Sample(0, entry, output, write, watch.sample(entry))
            await Relay(self.backend, [sample], entry.arrived + TIMEOUT_S).run()
        del self.cluster.contexts[entry.request_id]
        assert len(entry.emitted) == turn.answer_tokens
        assert not entry.failovers
        if entry.arrived - self._began >= self._warm_up_s:
            self.tally.ttft_s.append(first_at - entry.arrived)
            self.tally.latency_s.append(time.monotonic() - entry.arrived)
            self.tally.prompt_tokens += len(prompt)
            self.tally.cached_tokens += entry.cached_tokens
            self.tally.output_tokens += len(entry.emitted)
        return entry.context


def _timed(policy: Policy) -> list[float]:
    """Real seconds of each decision, as they come."""
    seconds: list[float] = []
    order = policy.order

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return order(*arguments)
        finally:
            seconds.append(time.perf_counter() - began)

    policy.order = timed  # type: ignore[method-assign, assignment]
    return seconds


def measure(policy: str, conversations: Sequence[Conversation], options: argparse.Namespace) -> dict[str, Any]:
    random.seed(options.seed)  # the pauses between attempts, and draws of two
    costs = Costs()

    async def simulate() -> tuple[Gateway, float]:
        gateway = Gateway(policy, tuple(options.workers), costs, options.seconds * 0.2, options.seed)
        return gateway, await gateway.replay(conversations)

    gateway, seconds = run(simulate())
    tally = gateway.tally
    return {
        "policy": policy,
        "requests": len(tally.ttft_s),
        "hit_rate": round(tally.cached_tokens / tally.prompt_tokens, 3),
        "ttft_ms": {"p50": _quantile(tally.ttft_s, 50), "p99": _quantile(tally.ttft_s, 99)},
        "latency_ms": {"p50": _quantile(tally.latency_s, 50), "p99": _quantile(tally.latency_s, 99)},
        "tokens_s": round(tally.output_tokens / (seconds - options.seconds * 0.2), 1),
        "spread": {role.value: _spread(gateway.cluster, role) for role in Role},
        "decision_us": round(statistics.median(gateway.decisions_s) * 1e6, 1),
    }


def _quantile(seconds: list[float], percent: int) -> float:
    """In milliseconds."""
    return round(statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1] * 1000, 1)


def _spread(cluster: Cluster, role: Role) -> float:
    """The busiest worker's working time as a multiple of the mean."""
    busy = [worker.busy_s for worker in cluster.workers.values() if worker.role is role]
    return round(max(busy) / statistics.mean(busy), 3)


HEAD = (
    f"{'trace':>11} {'conv/s':>6} {'policy':>17} {'hits':>6} {'TTFT p50':>9} {'p99, ms':>9} {'tokens/s':>9} "
    f"{'prefill':>8} {'decode':>7} {'us':>6}"
)


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['trace']:>11} {row['rate']:>6} {row['policy']:>17} {row['hit_rate']:>6.1%} {row['ttft_ms']['p50']:>9} "
        f"{row['ttft_ms']['p99']:>9} {row['tokens_s']:>9} {row['spread']['prefill']:>8} {row['spread']['decode']:>7} "
        f"{row['decision_us']:>6}"
    )


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """For each trace and rate: the first token's median and 99th percentile, by policy."""
    cases = dict.fromkeys((row["trace"], row["rate"]) for row in rows)
    return [
        Panel(
            f"{name}, {rate:g}/s",
            [
                (f"{row['policy']} ({row['hit_rate']:.0%})", (row["ttft_ms"]["p50"], row["ttft_ms"]["p99"]))
                for row in rows
                if (row["trace"], row["rate"]) == (name, rate)
            ],
        )
        for name, rate in cases
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Routing policies on the same traces.")
    parser.add_argument("--trace", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--policy", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--workers", nargs=2, type=int, default=[4, 4], metavar=("PREFILL", "DECODE"))
    parser.add_argument("--seconds", type=float, default=120.0, help="virtual ones; the first fifth is not counted")
    parser.add_argument("--rate", type=float, help="conversations a second (default: two for each trace)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(argv)
    print(HEAD)
    rows = []
    for name in options.trace:
        for rate in [options.rate] if options.rate else RATES[name]:
            conversations = trace(SHAPES[name], rate, options.seconds, options.seed)
            for policy in options.policy:
                rows.append({"trace": name, "rate": rate} | measure(policy, conversations, options))
                print(line(rows[-1]), flush=True)
    if options.out is not None:
        settings = {
            "workers": options.workers,
            "seconds": options.seconds,
            "seed": options.seed,
            "costs": dataclasses.asdict(Costs()),
            "traces": {name: dataclasses.asdict(SHAPES[name]) for name in options.trace},
        }
        result = {"machine": facts(), "simulated": True, "settings": settings, "results": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        title = "Time to first token by routing policy, ms: median and 99th percentile (hit rate); simulated workers"
        options.plot.write_text(svg(title, panels(rows)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
