"""Workers that compute nothing and take the time of a cost model, with the engine's own books of cached blocks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from benchmarks.routing_trace import VOCABULARY
from branchline.core import Fingerprint
from branchline.engine.blocks import BlockPool, blocks_for
from branchline.engine.prefix_cache import block_keys
from branchline.v1 import decode_pb2, prefill_pb2, types_pb2
from branchline.wire.status import RpcFailure
from gateway.worker import Role, Worker, WorkerStatus

FINGERPRINT = Fingerprint({"weights": "simulated"})


@dataclass(frozen=True)
class Costs:
    """Seconds, and sizes. Roughly an 8B model on one large GPU a worker."""

    block_size: int = 16
    #: A prefill worker computes one prompt after the other.
    prompt_s: float = 0.01
    prompt_token_s: float = 1e-4
    prefill_blocks: int = 4_000
    #: What the decode worker lacks of the KV goes there behind the computation.
    hand_off_s: float = 0.005
    hand_off_token_s: float = 2e-5
    #: An iteration of a decode worker, for itself and for each request in it; it brings each request so many tokens.
    #: (Several steps of a real one: fewer messages to simulate.)
    iteration_s: float = 0.08
    iteration_request_s: float = 0.002
    iteration_tokens: int = 8
    decode_blocks: int = 12_000
    max_batch: int = 32


class SimulatedWorker(Worker):
    """In place of one over gRPC: answers the same calls with the same messages."""

    def __init__(self, role: Role, address: str, cluster: Cluster) -> None:
        super().__init__(role, address)
        costs = cluster.costs
        self.cluster = cluster
        self.costs = costs
        self.blocks = BlockPool(costs.prefill_blocks if role is Role.PREFILL else costs.decode_blocks)
        #: Seconds of work since the beginning.
        self.busy_s = 0.0
        self.queued = 0
        cluster.workers[address] = self

    async def fetch_status(self, timeout_s: float) -> WorkerStatus:  # noqa: ARG002 - it answers at once
        return WorkerStatus(
            incarnation="1",
            fingerprint=FINGERPRINT,
            model="simulated",
            max_model_len=1 << 20,
            blocks_total=self.blocks.total,
            blocks_used=self.blocks.used,
            requests=self.queued,
            tasks=0,
            tree="none",
            tokens=int(self.busy_s * 1e6),
            max_batch=self.costs.max_batch,
        )

    def keys(self, token_ids: Sequence[int]) -> tuple[bytes, ...]:
        return self.cluster.keys(tuple(token_ids))

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """What a worker finds of a context: at least a token is left to compute."""
        whole = (len(token_ids) - 1) // self.costs.block_size
        return self.blocks.take(self.keys(token_ids)[:whole])

    def leave(self, held: Sequence[int], token_ids: Sequence[int]) -> None:
        """Releases the blocks of a context, the whole ones of which are known from now on."""
        keys = self.keys(token_ids)
        kept = [self.blocks.remember(block, key) for block, key in zip(held, keys, strict=False)]
        for block, known, key in zip(held, kept, keys, strict=False):
            if known != block:
                self.blocks.take([key])
                self.blocks.release([block])
        self.blocks.release([*kept, *held[len(kept) :]])


class SimulatedPrefill(SimulatedWorker):
    def __init__(self, address: str, cluster: Cluster) -> None:
        super().__init__(Role.PREFILL, address, cluster)
        self._turn = asyncio.Lock()  # which is fair

    async def stream(
        self,
        method: str,
        request: Any,
        timeout_s: float,  # noqa: ARG002 - the simulation is never late
        metadata: Sequence[tuple[str, str]] = (),  # noqa: ARG002 - nor traced
    ) -> AsyncGenerator[Any]:
        assert method == "Prefill"
        context = (*request.request.prompt, *request.request.emitted)
        self.queued += 1
        try:
            async with self._turn:
                cached = await self._compute(context)
            first = prefill_pb2.FirstToken(token_id=self.cluster.draw_token(), cached_tokens=cached)
            if len(request.request.emitted) + 1 == request.request.max_tokens:
                first.finish_reason = types_pb2.FINISH_REASON_LENGTH
            yield prefill_pb2.PrefillResponse(first_token=first)
            if not first.finish_reason:
                shipped = len(context) - request.held_tokens
                await asyncio.sleep(self.costs.hand_off_s + shipped * self.costs.hand_off_token_s)
                decode = self.cluster.workers[request.decode_address]
                assert isinstance(decode, SimulatedDecode)
                decode.leases[request.lease_id].ready.set()
                yield prefill_pb2.PrefillResponse(handed_off=prefill_pb2.HandedOff(frames=1))
        finally:
            self.queued -= 1

    async def _compute(self, context: tuple[int, ...]) -> int:
        """Tokens that were cached."""
        taken = self.take(context)
        held = [*taken, *self.blocks.allocate(blocks_for(len(context), self.costs.block_size) - len(taken))]
        cached = len(taken) * self.costs.block_size
        seconds = self.costs.prompt_s + (len(context) - cached) * self.costs.prompt_token_s
        await asyncio.sleep(seconds)
        self.busy_s += seconds
        self.leave(held, context)
        return cached


@dataclass(eq=False)
class Lease:
    held: list[int]
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    tokens: asyncio.Queue[int] = field(default_factory=asyncio.Queue)


class SimulatedDecode(SimulatedWorker):
    def __init__(self, address: str, cluster: Cluster) -> None:
        super().__init__(Role.DECODE, address, cluster)
        self.leases: dict[str, Lease] = {}
        self._running: list[Lease] = []
        self._room = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def call(self, method: str, request: Any, timeout_s: float) -> Any:  # noqa: ARG002 - see above
        if method == "Abort":
            self._end(request.lease_id, ())
            return decode_pb2.AbortResponse()
        assert method == "Reserve"
        context = tuple(request.context)
        need = blocks_for(request.max_length, self.costs.block_size)
        if not await self._wait_for_room(need, request.wait_ms / 1000):
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        taken = self.take(context)
        lease_id = f"{self.address}-{request.request_id}"
        self.leases[lease_id] = Lease([*taken, *self.blocks.allocate(need - len(taken))])
        self.queued += 1
        return decode_pb2.ReserveResponse(lease_id=lease_id, held_tokens=len(taken) * self.costs.block_size)

    async def stream(
        self,
        method: str,
        request: Any,
        timeout_s: float,  # noqa: ARG002
        metadata: Sequence[tuple[str, str]] = (),  # noqa: ARG002
    ) -> AsyncGenerator[Any]:
        assert method == "Attach"
        lease, one = self.leases[request.lease_id], request.request
        output = [*one.emitted]
        try:
            yield decode_pb2.AttachResponse(attached=decode_pb2.Attached())
            await lease.ready.wait()
            self._running.append(lease)
            if self._loop is None:
                self._loop = asyncio.create_task(self._iterate())
            index = len(output) + 1
            while index < one.max_tokens:
                count = min(await lease.tokens.get(), one.max_tokens - index)
                new = [self.cluster.draw_token() for _ in range(count)]
                yield decode_pb2.AttachResponse(tokens=decode_pb2.Tokens(index=index, token_ids=new))
                output += new
                index += count
            yield decode_pb2.AttachResponse(finished=decode_pb2.Finished(reason=types_pb2.FINISH_REASON_LENGTH))
        finally:
            if lease in self._running:
                self._running.remove(lease)
            self._end(request.lease_id, self.cluster.context_of(one.request_id))

    async def _iterate(self) -> None:
        while self._running:
            seconds = self.costs.iteration_s + len(self._running) * self.costs.iteration_request_s
            await asyncio.sleep(seconds)
            self.busy_s += seconds
            for lease in self._running:
                lease.tokens.put_nowait(self.costs.iteration_tokens)
            await asyncio.sleep(0)
        self._loop = None

    async def _wait_for_room(self, need: int, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(wait_s):
                while len(self.leases) >= self.costs.max_batch or not self.blocks.can_allocate(need):
                    if wait_s <= 0:
                        return False
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            return False
        return True

    def _end(self, lease_id: str, token_ids: Sequence[int]) -> None:
        if lease := self.leases.pop(lease_id, None):
            self.queued -= 1
            self.leave(lease.held, token_ids)
            self._room.set()


class Cluster:
    """What the workers of one simulation share."""

    def __init__(self, costs: Costs, seed: int) -> None:
        self.costs = costs
        self.workers: dict[str, SimulatedWorker] = {}
        #: What has been said in requests that run, by their ids: the decode worker's memory of a text.
        self.contexts: dict[str, Any] = {}
        self._draw = random.Random(seed)
        self._keys: dict[tuple[int, ...], tuple[bytes, ...]] = {}

    def connect(self, role: Role, address: str) -> Worker:
        return (SimulatedPrefill if role is Role.PREFILL else SimulatedDecode)(address, self)

    def draw_token(self) -> int:
        return self._draw.randrange(VOCABULARY)

    def context_of(self, request_id: str) -> tuple[int, ...]:
        """But for the last token, whose KV nobody has."""
        return tuple(self.contexts[request_id].context[:-1])

    def keys(self, token_ids: tuple[int, ...]) -> tuple[bytes, ...]:
        return tuple(block_keys(b"", token_ids, self.costs.block_size))
