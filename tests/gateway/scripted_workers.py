"""Workers that follow the protocol over real gRPC, compute nothing, and fail on request."""

# ruff: noqa: N802, ARG002 - the methods are named and called by gRPC

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from branchline.core import Fingerprint
from branchline.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from branchline.wire import convert
from branchline.wire.channels import open_channel
from branchline.wire.server import RpcServer
from branchline.wire.status import RpcFailure

FINGERPRINT = Fingerprint(target={"weights": "w1", "dtype": "float32"})


def token_at(prompt: tuple[int, ...], index: int) -> int:
    """The scripted model: the output token of a prompt at an output index, whoever computes it."""
    return 40 + (3 * sum(prompt) + 7 * index) % 50


def expected_tokens(prompt: tuple[int, ...], count: int) -> list[int]:
    return [token_at(prompt, index) for index in range(count)]


async def eventually(predicate, timeout_s: float = 2.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not predicate():
            await asyncio.sleep(0.01)


@dataclass
class ScriptedPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Errors in `failures` meet the calls in turn, before the first token; None lets a call pass."""

    fingerprint: Fingerprint = FINGERPRINT
    failures: list[RpcFailure | None] = field(default_factory=list)
    fail_after_first: RpcFailure | None = None
    slow_s: float = 0.0
    hang: bool = False
    computing: bool = False  # for others
    prefilled: int = 0
    finish_first: int = types_pb2.FINISH_REASON_UNSPECIFIED
    incarnation: str = "p1"
    requests: list[types_pb2.Request] = field(default_factory=list)
    running: int = 0

    async def Prefill(self, request, context):
        self.requests.append(request.request)
        self.running += 1
        try:
            if self.failures and (failure := self.failures.pop(0)):
                raise failure
            await asyncio.sleep(self.slow_s)
            if self.hang:
                await asyncio.sleep(60)
            emitted = tuple(request.request.emitted)
            token = token_at(tuple(request.request.prompt), len(emitted))
            first = prefill_pb2.FirstToken(token_id=token, finish_reason=self.finish_first)
            if self.finish_first == types_pb2.FINISH_REASON_UNSPECIFIED and request.request.max_tokens == 1:
                first.finish_reason = types_pb2.FINISH_REASON_LENGTH
            yield prefill_pb2.PrefillResponse(first_token=first)
            if first.finish_reason:
                return
            if self.fail_after_first:
                raise self.fail_after_first
            await self._hand_off(request, token)
            yield prefill_pb2.PrefillResponse(handed_off=prefill_pb2.HandedOff(frames=1))
        finally:
            self.running -= 1

    async def GetStatus(self, request, context):
        self.prefilled += self.computing
        return prefill_pb2.PrefillServiceGetStatusResponse(
            incarnation=self.incarnation,
            fingerprint=convert.fingerprint_to_proto(self.fingerprint),
            model="scripted",
            max_model_len=256,
            blocks_total=10,
            queued=self.running,
            prefilled_tokens=self.prefilled,
        )

    async def _hand_off(self, request: prefill_pb2.PrefillRequest, token: int) -> None:
        parts = [
            decode_pb2.HandoffRequest(header=decode_pb2.HandoffHeader(lease_id=request.lease_id, kv_dtype="float32")),
            decode_pb2.HandoffRequest(draft=decode_pb2.DraftFrame(index=0, first_token=token)),
            decode_pb2.HandoffRequest(commit=decode_pb2.CommitFrame(frames=1)),
        ]
        async with open_channel(request.decode_address) as channel:
            stub = decode_pb2_grpc.DecodeServiceStub(channel)
            try:
                async for response in stub.Handoff(iter(parts), timeout=10):
                    assert response.next_index == 1
            except grpc.aio.AioRpcError as error:
                raise RpcFailure(error.code(), f"hand-off: {error.details()}") from error


@dataclass
class Lease:
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    attached: bool = False


@dataclass
class ScriptedDecode(decode_pb2_grpc.DecodeServiceServicer):
    """Fails in the first `failing` streams, `after` so many tokens: with `failure`, or it hangs without one."""

    fingerprint: Fingerprint = FINGERPRINT
    refusals: list[RpcFailure] = field(default_factory=list)
    failing: int = 0
    after: int = 3
    failure: RpcFailure | None = None
    pace_s: float = 0.0
    reserve_s: float = 0.0
    capacity: int = 100
    repeat: int = 0  # how many tokens each message repeats of those before
    skip_at: int = -1  # the output index that is left out, in the first stream
    incarnation: str = "d1"
    leases: dict[str, Lease] = field(default_factory=dict)
    reserved: int = 0
    most_leases: int = 0
    aborts: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def Reserve(self, request, context):
        if self.refusals:
            raise self.refusals.pop(0)
        if len(self.leases) >= self.capacity:
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "no slot")
        self.reserved += 1
        lease_id = f"{self.incarnation}-{self.reserved}"
        self.leases[lease_id] = Lease()
        self.most_leases = max(self.most_leases, len(self.leases))
        await asyncio.sleep(self.reserve_s)
        return decode_pb2.ReserveResponse(lease_id=lease_id, ttl_ms=10_000, accepts_draft=True)

    async def Attach(self, request, context):
        lease = self.leases.get(request.lease_id)
        if lease is None:
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, "unknown lease")
        lease.attached = True
        try:
            yield decode_pb2.AttachResponse(attached=decode_pb2.Attached())
            if not await self._ready(lease):
                raise RpcFailure(grpc.StatusCode.ABORTED, "the lease was aborted")
            async for response in self._tokens(request.request):
                yield response
        except asyncio.CancelledError:
            self.cancelled.append(request.lease_id)
            raise
        finally:
            self.leases.pop(request.lease_id, None)

    async def Handoff(self, request_iterator, context):
        async for part in request_iterator:
            match part.WhichOneof("part"):
                case "header":
                    lease = self.leases.get(part.header.lease_id)
                    if lease is None or not lease.attached:
                        raise RpcFailure(grpc.StatusCode.NOT_FOUND, "unknown lease, or no stream is open")
                case "commit":
                    lease.ready.set()
                    yield decode_pb2.HandoffResponse(next_index=1, ready=True)

    async def Abort(self, request, context):
        self.aborts.append(request.lease_id)
        if lease := self.leases.pop(request.lease_id, None):
            lease.aborted.set()
        return decode_pb2.AbortResponse()

    async def GetStatus(self, request, context):
        return decode_pb2.DecodeServiceGetStatusResponse(
            incarnation=self.incarnation,
            fingerprint=convert.fingerprint_to_proto(self.fingerprint),
            model="scripted",
            max_model_len=256,
            blocks_total=20,
            blocks_used=2 * len(self.leases),
            leases=len(self.leases),
            tree="none",
        )

    async def _ready(self, lease: Lease) -> bool:
        waits = [asyncio.create_task(event.wait()) for event in (lease.ready, lease.aborted)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return lease.ready.is_set()

    async def _tokens(self, request: types_pb2.Request) -> AsyncIterator[decode_pb2.AttachResponse]:
        prompt = tuple(request.prompt)
        start = len(request.emitted)
        fails = self.failing > 0
        self.failing -= fails
        for index in range(start, request.max_tokens):
            if fails and index - start >= self.after:
                if self.failure is None:
                    await asyncio.sleep(60)
                raise self.failure
            if index == self.skip_at:
                self.skip_at = -1
                continue
            first = max(start, index - self.repeat)
            ids = [token_at(prompt, i) for i in range(first, index + 1)]
            steps = index - start  # the first token is prefill's
            stats = types_pb2.Speculation(target_forwards=steps, drafted=2 * steps)
            yield decode_pb2.AttachResponse(tokens=decode_pb2.Tokens(index=first, token_ids=ids, speculation=stats))
            await asyncio.sleep(self.pace_s)
        yield decode_pb2.AttachResponse(finished=decode_pb2.Finished(reason=types_pb2.FINISH_REASON_LENGTH))


@contextlib.asynccontextmanager
async def running(worker: ScriptedPrefill | ScriptedDecode, port: int = 0) -> AsyncIterator[tuple[RpcServer, str]]:
    """The worker's server and its address."""
    server = RpcServer("127.0.0.1", port)
    if isinstance(worker, ScriptedPrefill):
        server.add("branchline.v1.PrefillService", worker, prefill_pb2_grpc.add_PrefillServiceServicer_to_server)
    else:
        server.add("branchline.v1.DecodeService", worker, decode_pb2_grpc.add_DecodeServiceServicer_to_server)
    address = await server.start()
    try:
        yield server, address
    finally:
        await server.stop(0)
