"""The PrefillService: one request's way from prompt to hand-off."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from branchline.core import MAX_PRIORITY, MAX_SAMPLES, InvalidRequestError, Request, rank_of
from branchline.engine.thread import EngineStoppedError, EngineThread
from branchline.observe.logs import about
from branchline.observe.tracing import NoTracer, Span, Tracer, Value, trace_context
from branchline.v1 import decode_pb2, prefill_pb2, prefill_pb2_grpc
from branchline.wire.convert import fingerprint_to_proto, finish_reason_to_proto, logprobs_to_proto, request_from_proto
from branchline.wire.transfer import Transport
from branchline.workload import Workload
from prefill_worker.channels import DecodeChannels
from prefill_worker.engine_loop import Failed, FirstToken, PrefillLoop
from prefill_worker.handoff import HandoffSender
from prefill_worker.jobs import PrefillJob, Shipment, failure
from prefill_worker.metrics import HandoffCounts, prefill_registry
from prefill_worker.outbox import HandoffTotals

SERVICE = "branchline.v1.PrefillService"

logger = logging.getLogger(__name__)


class PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    """`stall_s`: how long a decode worker may leave a hand-off unanswered; `channels` are closed with it."""

    def __init__(
        self,
        thread: EngineThread,
        engine: PrefillLoop,
        incarnation: str,
        stall_s: float,
        channels: DecodeChannels,
        tracer: Tracer | None = None,
    ) -> None:
        self._thread = thread
        self._engine = engine
        self._incarnation = incarnation
        self._stall_s = stall_s
        self._channels = channels
        self._job_ids = itertools.count()
        self._requests = 0
        self._shipping: set[asyncio.Task[HandoffTotals]] = set()
        self._tracer = tracer or NoTracer()
        self._handoffs = HandoffCounts()
        self.registry = prefill_registry(engine, self._handoffs, lambda: self._requests, lambda: len(self._shipping))

    async def close(self) -> None:
        """Closes the connections to decode workers; after the server has stopped."""
        await self._channels.close()

    async def Prefill(  # noqa: N802
        self, message: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[prefill_pb2.PrefillResponse]:
        request, samples = request_from_proto(message.request), message.samples or 1
        if samples > MAX_SAMPLES:
            raise InvalidRequestError(f"samples must be at most {MAX_SAMPLES}, got {samples}")
        if not -MAX_PRIORITY <= message.priority <= MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {message.priority}"
            )
        rank = rank_of(time.monotonic(), message.queued_ms / 1000, message.priority)
        if message.held_tokens >= len(request.context):
            raise InvalidRequestError(
                f"held_tokens must be below the context's {len(request.context)}, got {message.held_tokens}"
            )
        parent = trace_context(context.invocation_metadata() or ())
        ship = Shipment(samples, message.ship_draft, message.held_tokens)
        job = PrefillJob(next(self._job_ids), request, ship, rank, self._thread, self._engine)
        self._requests += 1
        facts: dict[str, Value] = {
            "branchline.request_id": request.request_id,
            "branchline.context_tokens": len(request.context),
        }
        try:
            with self._tracer.span("prefill", parent, facts) as span:
                await job.begin()
                header = decode_pb2.HandoffHeader(
                    lease_id=message.lease_id,
                    kv_dtype=str(self._engine.runner.target_kv.dtype).removeprefix("torch."),
                )
                async with (
                    self._channels.use(message.decode_address) as transport,
                    self._shipped(job, transport, message.decode_address, header, span) as shipping,
                    contextlib.aclosing(_answer(job, shipping)) as responses,
                ):
                    async for response in responses:
                        if response.HasField("first_token"):
                            cached = response.first_token.cached_tokens
                            span.event("first token", {"branchline.cached_tokens": cached})
                        yield response
            logger.info("event=prefilled context=%d", len(request.context), extra=about(request.request_id))
        finally:
            self._requests -= 1
            job.release().add_done_callback(lambda released: _on_released(request, released))

    async def GetStatus(  # noqa: N802
        self, _: prefill_pb2.PrefillServiceGetStatusRequest, __: grpc.aio.ServicerContext
    ) -> prefill_pb2.PrefillServiceGetStatusResponse:
        engine = self._engine
        return prefill_pb2.PrefillServiceGetStatusResponse(
            incarnation=self._incarnation,
            fingerprint=fingerprint_to_proto(engine.models.fingerprint),
            model=engine.models.name,
            max_model_len=engine.runner.max_model_len,
            # Plain reads of counters: status is answered in the middle of a step, too.
            blocks_total=engine.runner.pool.total,
            blocks_used=engine.runner.pool.used,
            queued=self._requests,
            tasks=self._requests + len(self._shipping),
            prefilled_tokens=engine.prefilled_tokens,
        )

    def workload(self) -> Workload:
        """On the service's event loop."""
        pool = self._engine.runner.pool
        return Workload(
            running=self._requests,
            unfinished=self._requests + len(self._shipping),
            blocks_used=pool.used,
            blocks_total=pool.total,
            tokens=self._engine.prefilled_tokens,
            fingerprint=self._engine.models.fingerprint,
        )

    @contextlib.asynccontextmanager
    async def _shipped(
        self, job: PrefillJob, transport: Transport, address: str, header: decode_pb2.HandoffHeader, prefill: Span
    ) -> AsyncGenerator[asyncio.Task[HandoffTotals]]:
        """The hand-off as a task that ends, one way or the other, with the block."""
        shipping = asyncio.create_task(self._ship(job, transport, address, header, prefill))
        self._shipping.add(shipping)
        # Not behind the wait below: a call that fails may be cancelled as well while it waits there.
        shipping.add_done_callback(self._on_shipped)
        try:
            yield shipping
        finally:
            shipping.cancel()
            await asyncio.wait({shipping})

    async def _ship(
        self, job: PrefillJob, transport: Transport, address: str, header: decode_pb2.HandoffHeader, prefill: Span
    ) -> HandoffTotals:
        """Raises RpcFailure when the hand-off can't be completed."""
        counts, chosen_at = self._handoffs, [time.monotonic()]
        job.first[0].add_done_callback(lambda _: chosen_at.append(time.monotonic()))
        facts = {"branchline.lease_id": header.lease_id, "branchline.decode_address": address}
        with self._tracer.span("hand-off", prefill.metadata, facts, serves=False) as span:
            sender = HandoffSender(
                transport, address, header, job.messages(), self._stall_s, span.metadata, job.request_id
            )
            outcome = "failed"
            try:
                totals = await sender.run()
                outcome = "complete"
            except asyncio.CancelledError:
                outcome = "cancelled"
                raise
            finally:
                counts.ended[outcome] += 1
                counts.retries += sender.retries
                span.set({"branchline.retries": sender.retries})
            counts.kv_bytes += totals.kv_bytes
            counts.seconds.observe(time.monotonic() - chosen_at[-1])
            span.set({"branchline.kv_bytes": totals.kv_bytes, "branchline.tree_nodes": totals.tree_nodes})
            return totals

    def _on_shipped(self, shipping: asyncio.Task[HandoffTotals]) -> None:
        self._shipping.remove(shipping)
        if not shipping.cancelled():
            shipping.exception()  # seen, if it mattered


async def _answer(
    job: PrefillJob, shipping: asyncio.Task[HandoffTotals]
) -> AsyncGenerator[prefill_pb2.PrefillResponse]:
    """The first tokens, then the hand-off's totals. A hand-off that fails early ends it before the first token."""
    goes_on = False
    for chosen in job.first:
        either: set[asyncio.Future[Any]] = {chosen, shipping}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not chosen.done():
            shipping.result()  # raises: a hand-off can't be complete without the first tokens
        first = chosen.result()
        if isinstance(first, Failed):
            raise failure(first.reason)
        goes_on = goes_on or first.choice.finish is None
        yield prefill_pb2.PrefillResponse(first_token=_first_token(first))
    if not goes_on:
        return
    totals = await shipping
    handed_off = prefill_pb2.HandedOff(kv_bytes=totals.kv_bytes, frames=totals.frames, tree_nodes=totals.tree_nodes)
    yield prefill_pb2.PrefillResponse(handed_off=handed_off)


def _first_token(first: FirstToken) -> prefill_pb2.FirstToken:
    choice = first.choice
    return prefill_pb2.FirstToken(
        token_id=choice.token_id,
        finish_reason=finish_reason_to_proto(choice.finish),
        sample=first.sample,
        logprobs=None if choice.logprobs is None else logprobs_to_proto(choice.logprobs),
        cached_tokens=first.cached_tokens,
    )


def _on_released(request: Request, released: asyncio.Future[None]) -> None:
    error = None if released.cancelled() else released.exception()
    if error is not None and not isinstance(error, EngineStoppedError):
        logger.error("release failed", extra=about(request.request_id), exc_info=error)
