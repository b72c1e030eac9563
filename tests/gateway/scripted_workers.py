"""Workers that follow the protocol over real gRPC, compute nothing, and fail on request."""

# ruff: noqa: N802, ARG002 - the methods are named and called by gRPC

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from branchline.core import PRIORITY_S, Fingerprint
from branchline.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from branchline.wire import convert
from branchline.wire.channels import open_channel
from branchline.wire.server import RpcServer
from branchline.wire.status import RpcFailure

FINGERPRINT = Fingerprint(target={"weights": "w1", "dtype": "float32"})


def token_at(prompt: tuple[int, ...], index: int, sample: int = 0) -> int:
    """The scripted model: a sample's output token of a prompt at an output index, whoever computes it."""
    return 40 + (3 * sum(prompt) + 7 * index + 11 * sample) % 50


def expected_tokens(prompt: tuple[int, ...], count: int, sample: int = 0) -> list[int]:
    return [token_at(prompt, index, sample) for index in range(count)]


def logprobs_at(prompt: tuple[int, ...], index: int, sample: int, top: int) -> types_pb2.TokenLogprobs:
    """Of that token: numbers that tell all of its coordinates, and survive 32 bits."""
    likeliest = [token_at(prompt, index, sample), *range(20)][:top]
    return types_pb2.TokenLogprobs(
        logprob=-index - sample / 16,
        top_token_ids=likeliest,
        top_logprobs=[-index - rank / 32 for rank in range(len(likeliest))],
    )


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
    script: tuple[int, ...] = ()  # what every sample emits, in place of `token_at`
    finish_samples: tuple[int, ...] = ()  # those that end with their first token
    forget_logprobs: bool = False
    cached: int = 0
    incarnation: str = "p1"
    max_model_len: int = 256
    requests: list[types_pb2.Request] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)  # asked for with each request
    places: list[tuple[int, int]] = field(default_factory=list)  # priority and queued_ms that came with it
    held: list[int] = field(default_factory=list)  # and what the decode worker has
    running: int = 0

    async def Prefill(self, request, context):
        self.requests.append(request.request)
        self.samples.append(request.samples)
        self.places.append((request.priority, request.queued_ms))
        self.held.append(request.held_tokens)
        self.running += 1
        try:
            if self.failures and (failure := self.failures.pop(0)):
                raise failure
            await asyncio.sleep(self.slow_s)
            if self.hang:
                await asyncio.sleep(60)
            firsts = [self._first_token(request.request, sample) for sample in range(request.samples or 1)]
            for first in firsts:
                yield prefill_pb2.PrefillResponse(first_token=first)
            if all(first.finish_reason for first in firsts):
                return
            if self.fail_after_first:
                raise self.fail_after_first
            await asyncio.sleep(0.02)  # as long as a quick hand-off takes: the gateway hears of these tokens first
            await self._hand_off(request, firsts)
            yield prefill_pb2.PrefillResponse(handed_off=prefill_pb2.HandedOff(frames=1))
        finally:
            self.running -= 1

    async def GetStatus(self, request, context):
        self.prefilled += self.computing
        return prefill_pb2.PrefillServiceGetStatusResponse(
            incarnation=self.incarnation,
            fingerprint=convert.fingerprint_to_proto(self.fingerprint),
            model="scripted",
            max_model_len=self.max_model_len,
            blocks_total=10,
            queued=self.running,
            prefilled_tokens=self.prefilled,
        )

    def _first_token(self, request: types_pb2.Request, sample: int) -> prefill_pb2.FirstToken:
        prompt, index = tuple(request.prompt), len(request.emitted)
        number = request.sampling.sample_index + sample
        first = prefill_pb2.FirstToken(
            token_id=self.script[index] if self.script else token_at(prompt, index, number),
            finish_reason=self.finish_first,
            sample=sample,
            cached_tokens=self.cached + len(request.emitted),
        )
        if request.HasField("logprobs") and not self.forget_logprobs:
            first.logprobs.CopyFrom(logprobs_at(prompt, index, number, request.logprobs))
        if number in self.finish_samples:
            first.finish_reason = types_pb2.FINISH_REASON_STOP
        elif not first.finish_reason and index + 1 == request.max_tokens:
            first.finish_reason = types_pb2.FINISH_REASON_LENGTH
        return first

    async def _hand_off(self, request: prefill_pb2.PrefillRequest, firsts: list[prefill_pb2.FirstToken]) -> None:
        drafts = [
            decode_pb2.HandoffRequest(
                draft=decode_pb2.DraftFrame(index=index, first_token=first.token_id, sample=first.sample)
            )
            for index, first in enumerate(firsts)
        ]
        parts = [
            decode_pb2.HandoffRequest(header=decode_pb2.HandoffHeader(lease_id=request.lease_id, kv_dtype="float32")),
            *drafts,
            decode_pb2.HandoffRequest(commit=decode_pb2.CommitFrame(frames=len(drafts))),
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
    lease_id: str
    ready: asyncio.Event  # one for all samples of a hand-off
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    preempted: asyncio.Event = field(default_factory=asyncio.Event)
    attached: bool = False
    siblings: list[Lease] = field(default_factory=list)  # of the first sample's lease


@dataclass
class ScriptedDecode(decode_pb2_grpc.DecodeServiceServicer):
    """Fails in the first `failing` streams, `after` so many tokens: with `failure`, or it hangs without one.

    `preempting` streams end in the same way with `preempted`. `failing_sample` limits both to streams of that sample.
    """

    fingerprint: Fingerprint = FINGERPRINT
    refusals: list[RpcFailure] = field(default_factory=list)
    failing: int = 0
    preempting: int = 0
    failing_sample: int | None = None
    after: int = 3
    failure: RpcFailure | None = None
    pace_s: float = 0.0
    sample_pace_s: float = 0.0  # more for each sample
    reserve_s: float = 0.0
    capacity: int = 100
    max_batch: int = 16
    held: int = 0  # tokens of a context that it says it has
    preempt_hand_offs: int = 0
    preempt_streams: int = 0  # as soon as they are opened
    finish_samples: tuple[int, ...] = ()  # those that end with their first token
    script: tuple[int, ...] = ()  # what every sample emits, in place of `token_at`; then it stops
    repeat: int = 0  # how many tokens each message repeats of those before
    skip_at: int = -1  # the output index that is left out, in the first stream
    incarnation: str = "d1"
    max_model_len: int = 256
    leases: dict[str, Lease] = field(default_factory=dict)
    reservations: list[decode_pb2.ReserveRequest] = field(default_factory=list)
    requests: list[types_pb2.Request] = field(default_factory=list)
    reserved: int = 0
    most_leases: int = 0
    waiting: list[float] = field(default_factory=list)  # ranks, sorted
    aborts: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def Reserve(self, request, context):
        self.reservations.append(request)
        if self.refusals:
            raise self.refusals.pop(0)
        samples = request.samples or 1
        if not await self._room(request, samples):
            raise RpcFailure(grpc.StatusCode.RESOURCE_EXHAUSTED, "no slot")
        ready = asyncio.Event()
        leases = []
        for _ in range(samples):
            self.reserved += 1
            leases.append(Lease(f"{self.incarnation}-{self.reserved}", ready))
        leases[0].siblings = leases[1:]
        self.leases |= {lease.lease_id: lease for lease in leases}
        self.most_leases = max(self.most_leases, len(self.leases))
        await asyncio.sleep(self.reserve_s)
        ids = [lease.lease_id for lease in leases]
        return decode_pb2.ReserveResponse(
            lease_id=ids[0], sibling_lease_ids=ids[1:], ttl_ms=10_000, accepts_draft=True, held_tokens=self.held
        )

    async def _room(self, request: decode_pb2.ReserveRequest, samples: int) -> bool:
        """Waits its turn for it, by priority and age, as long as the request lets it."""
        now = time.monotonic()
        rank = now - request.queued_ms / 1000 - request.priority * PRIORITY_S
        bisect.insort(self.waiting, rank)
        try:
            while len(self.leases) + samples > min(self.capacity, self.max_batch) or self.waiting[0] < rank:
                if time.monotonic() - now >= request.wait_ms / 1000:
                    return False
                await asyncio.sleep(0.005)
            return True
        finally:
            self.waiting.remove(rank)

    async def Attach(self, request, context):
        lease = self.leases.get(request.lease_id)
        if lease is None:
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, "unknown lease")
        lease.attached = True
        self.requests.append(request.request)
        try:
            yield decode_pb2.AttachResponse(attached=decode_pb2.Attached())
            if self.preempt_streams:
                self.preempt_streams -= 1
                lease.preempted.set()
            match await self._ready(lease):
                case "aborted":
                    raise RpcFailure(grpc.StatusCode.ABORTED, "the lease was aborted")
                case "preempted":
                    yield decode_pb2.AttachResponse(preempted=decode_pb2.Preempted())
                    return
            async for response in self._tokens(request.request):
                yield response
        except asyncio.CancelledError:
            self.cancelled.append(request.lease_id)
            raise
        finally:
            self._end(request.lease_id)

    async def Handoff(self, request_iterator, context):
        lease = None
        async for part in request_iterator:
            match part.WhichOneof("part"):
                case "header":
                    lease = self.leases.get(part.header.lease_id)
                    if lease is None or not all(one.attached for one in [lease, *lease.siblings]):
                        raise RpcFailure(grpc.StatusCode.NOT_FOUND, "unknown lease, or no stream is open")
                    if self.preempt_hand_offs:
                        self.preempt_hand_offs -= 1
                        for one in [lease, *lease.siblings]:
                            one.preempted.set()
                        raise RpcFailure(grpc.StatusCode.ABORTED, "preempted")
                case "commit":
                    if lease is None or lease.aborted.is_set():
                        raise RpcFailure(grpc.StatusCode.ABORTED, "the lease has ended")
                    lease.ready.set()
                    yield decode_pb2.HandoffResponse(next_index=1, ready=True)

    async def Abort(self, request, context):
        self.aborts.append(request.lease_id)
        self._end(request.lease_id)
        return decode_pb2.AbortResponse()

    def _end(self, lease_id: str) -> None:
        """A lease that ends before the commit takes those of its samples with it."""
        if lease := self.leases.pop(lease_id, None):
            lease.aborted.set()
            for sibling in lease.siblings if not lease.ready.is_set() else ():
                self._end(sibling.lease_id)

    async def GetStatus(self, request, context):
        return decode_pb2.DecodeServiceGetStatusResponse(
            incarnation=self.incarnation,
            fingerprint=convert.fingerprint_to_proto(self.fingerprint),
            model="scripted",
            max_model_len=self.max_model_len,
            blocks_total=20,
            blocks_used=2 * len(self.leases),
            leases=len(self.leases),
            max_batch=self.max_batch,
            tree="none",
        )

    async def _ready(self, lease: Lease) -> str:
        """What comes first: "preempted", "ready" or "aborted"."""
        events = {"preempted": lease.preempted, "ready": lease.ready, "aborted": lease.aborted}
        waits = [asyncio.create_task(event.wait()) for event in events.values()]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return next(name for name, event in events.items() if event.is_set())

    async def _tokens(self, request: types_pb2.Request) -> AsyncIterator[decode_pb2.AttachResponse]:
        prompt, sample = tuple(request.prompt), request.sampling.sample_index
        start = len(request.emitted)
        hit = self.failing_sample in (None, sample)
        fails = hit and self.failing > 0
        self.failing -= fails
        preempts = hit and self.preempting > 0
        self.preempting -= preempts
        end = start + 1 if sample in self.finish_samples else request.max_tokens
        if self.script:
            end = min(end, len(self.script))
        for index in range(start, end):
            if preempts and index - start >= self.after:
                yield decode_pb2.AttachResponse(preempted=decode_pb2.Preempted())
                return
            if fails and index - start >= self.after:
                if self.failure is None:
                    await asyncio.sleep(60)
                raise self.failure
            if index == self.skip_at:
                self.skip_at = -1
                continue
            first = max(start, index - self.repeat)
            steps = index - start  # the first token is prefill's
            tokens = decode_pb2.Tokens(
                index=first,
                token_ids=self.script[first : index + 1]
                or [token_at(prompt, i, sample) for i in range(first, index + 1)],
                speculation=types_pb2.Speculation(target_forwards=steps, drafted=2 * steps),
            )
            if request.HasField("logprobs"):
                tokens.logprobs.extend(
                    logprobs_at(prompt, i, sample, request.logprobs) for i in range(first, index + 1)
                )
            yield decode_pb2.AttachResponse(tokens=tokens)
            await asyncio.sleep(self.pace_s + sample * self.sample_pace_s)
        reason = types_pb2.FINISH_REASON_STOP if end < request.max_tokens else types_pb2.FINISH_REASON_LENGTH
        yield decode_pb2.AttachResponse(finished=decode_pb2.Finished(reason=reason))


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
