"""The DecodeService: messages in and out; what they do is in `sessions` and `handoff`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import grpc

from branchline.core import Fingerprint
from branchline.observe.tracing import NoTracer, Tracer, Value, trace_context
from branchline.v1 import decode_pb2, decode_pb2_grpc
from branchline.wire.convert import (
    fingerprint_from_proto,
    fingerprint_to_proto,
    finish_reason_to_proto,
    logprobs_to_proto,
    request_from_proto,
    speculation_to_proto,
)
from branchline.wire.kv_codec import Incoming, parse_request
from branchline.wire.status import RpcFailure
from decode_worker.handoff import receive_handoff
from decode_worker.leases import LeaseState
from decode_worker.reservations import Ask
from decode_worker.session import Aborted, Finish, Preempted, Session, TokenBatch
from decode_worker.sessions import Sessions

SERVICE = "branchline.v1.DecodeService"
#: What parses requests in place of the generated classes, by method.
PARSERS = {"Handoff": parse_request}


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, sessions: Sessions, tracer: Tracer | None = None) -> None:
        self._tracer = tracer or NoTracer()
        self._sessions = sessions
        #: Handlers that serve a request now; GetStatus is not one of them.
        self._tasks = 0

    async def Reserve(  # noqa: N802
        self, message: decode_pb2.ReserveRequest, _: grpc.aio.ServicerContext
    ) -> decode_pb2.ReserveResponse:
        ours, theirs = self._sessions.engine.models.fingerprint, fingerprint_from_proto(message.fingerprint)
        if (difference := ours.difference(theirs)) is not None:
            raise RpcFailure(
                grpc.StatusCode.FAILED_PRECONDITION, f"the workers can't share KV: fingerprint {difference}"
            )
        ask = Ask(
            message.request_id,
            message.attempt,
            message.context_length,
            message.max_length,
            accepts_draft=_same_draft(ours, theirs),
            samples=message.samples or 1,
            priority=message.priority,
            queued_s=message.queued_ms / 1000,
            context=tuple(message.context),
        )
        with self._serving():
            first, *siblings = await self._sessions.reserve(ask, wait_s=message.wait_ms / 1000)
        return decode_pb2.ReserveResponse(
            lease_id=first.lease_id,
            ttl_ms=round(self._sessions.table.ttl_s * 1000),
            accepts_draft=first.accepts_draft,
            sibling_lease_ids=[lease.lease_id for lease in siblings],
            held_tokens=first.held_tokens,
        )

    async def Attach(  # noqa: N802
        self, message: decode_pb2.AttachRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.AttachResponse]:
        request = request_from_proto(message.request)
        if self._sessions.table.was_preempted(message.lease_id):  # before anybody came: the same news as after
            yield decode_pb2.AttachResponse(attached=decode_pb2.Attached())
            yield decode_pb2.AttachResponse(preempted=decode_pb2.Preempted())
            return
        session = self._sessions.attach(message.lease_id, request)
        facts = {"branchline.request_id": request.request_id, "branchline.lease_id": message.lease_id}
        parent = trace_context(context.invocation_metadata() or ())
        with self._serving(), self._tracer.span("decode", parent, facts) as span:
            try:
                yield decode_pb2.AttachResponse(attached=decode_pb2.Attached())
                # No deadline of its own: the call's is the gateway's, and a peer that died is found by keepalive.
                while True:
                    match await session.events.get():
                        case TokenBatch() as batch:
                            if batch.index == len(request.emitted):
                                span.event("started")
                            yield decode_pb2.AttachResponse(tokens=_tokens(batch))
                        case Finish(reason):
                            finished = decode_pb2.Finished(reason=finish_reason_to_proto(reason))
                            yield decode_pb2.AttachResponse(finished=finished)
                            return
                        case Preempted():
                            yield decode_pb2.AttachResponse(preempted=decode_pb2.Preempted())
                            return
                        case Aborted(reason):
                            raise RpcFailure(grpc.StatusCode.ABORTED, f"lease {message.lease_id} has ended: {reason}")
            finally:
                span.set(_decoded(session))
                self._sessions.detach(session)

    async def Handoff(  # noqa: N802
        self, requests: AsyncIterator[Incoming], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.HandoffResponse]:
        parent = trace_context(context.invocation_metadata() or ())
        with self._serving(), self._tracer.span("hand-off receive", parent):
            async with contextlib.aclosing(receive_handoff(self._sessions, requests)) as responses:
                async for response in responses:
                    yield response

    async def Abort(  # noqa: N802
        self, message: decode_pb2.AbortRequest, _: grpc.aio.ServicerContext
    ) -> decode_pb2.AbortResponse:
        self._sessions.live.abort(message.lease_id, message.reason or "the gateway aborted it")
        return decode_pb2.AbortResponse()

    async def GetStatus(  # noqa: N802
        self, _: decode_pb2.DecodeServiceGetStatusRequest, __: grpc.aio.ServicerContext
    ) -> decode_pb2.DecodeServiceGetStatusResponse:
        sessions, engine = self._sessions, self._sessions.engine
        return decode_pb2.DecodeServiceGetStatusResponse(
            incarnation=sessions.table.incarnation,
            fingerprint=fingerprint_to_proto(engine.models.fingerprint),
            model=engine.models.name,
            max_model_len=engine.runner.max_model_len,
            # A plain read of a counter: status is answered in the middle of a step, too.
            blocks_total=engine.runner.pool.total,
            blocks_used=engine.runner.pool.used,
            leases=len(sessions.table),
            running=sessions.table.count(LeaseState.RUNNING),
            max_batch=engine.runner.max_batch,
            tasks=self._tasks,
            tree=engine.tree.spec,
            speculation=speculation_to_proto(sessions.totals.speculation),
            emitted_tokens=sessions.totals.emitted_tokens,
            cold_starts=sessions.totals.cold_starts,
            queued=len(sessions.waiting),
            preemptions=sessions.totals.preemptions,
            reused_tokens=sessions.totals.reused_tokens,
        )

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        self._tasks += 1
        try:
            yield
        finally:
            self._tasks -= 1


def _decoded(session: Session) -> dict[str, Value]:
    """What a decode span says of its lease."""
    speculation, emitted = session.speculation, len(session.request.emitted) if session.request else 0
    return {
        "gen_ai.usage.output_tokens": session.next_output - emitted,
        "branchline.target_forwards": speculation.target_forwards,
        "branchline.drafted_tokens": speculation.drafted,
        "branchline.accepted_tokens": speculation.accepted,
    }


def _tokens(batch: TokenBatch) -> decode_pb2.Tokens:
    return decode_pb2.Tokens(
        index=batch.index,
        token_ids=batch.token_ids,
        speculation=speculation_to_proto(batch.speculation),
        logprobs=map(logprobs_to_proto, batch.logprobs),
    )


def _same_draft(ours: Fingerprint, theirs: Fingerprint) -> bool:
    return bool(ours.draft) and ours.draft == theirs.draft
