"""The gateway's gRPC service."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import time
from collections.abc import Iterator, Sequence

import grpc

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2, gateway_pb2_grpc
from branchline.wire.status import RpcFailure
from gateway.backend import Backend
from gateway.journal import JournalEntry
from gateway.limits import Limits
from gateway.output import Output
from gateway.relay import Relay
from gateway.sample import Sample, Write
from gateway.tokens import Tokens
from gateway.validate import resolve
from gateway.worker import Role, Worker

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 2.0
_ANSWER_S = 0.1


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """`active_requests` is the number of Generate calls that are being served."""

    def __init__(self, backend: Backend, tokens: Tokens, model: str) -> None:
        self.active_requests = 0
        self._backend = backend
        self._config = backend.config
        self._tokens = tokens
        self._model = model

    async def Generate(  # noqa: N802 - named by the proto
        self, request: gateway_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        with self._admitted():
            remaining = context.time_remaining()
            timeout_s = self._config.request_timeout_s if remaining is None else remaining - _answer_s(remaining)
            arrived = time.monotonic()
            relay = None
            try:
                async with asyncio.timeout(timeout_s):
                    entries = await resolve(request, self._tokens, self._limits(), arrived)
                    relay = Relay(self._backend, self._samples(entries, context.write), arrived + timeout_s)
                    await relay.run()
            except TimeoutError:
                raise relay.timed_out() if relay else _deadline_passed() from None

    async def GetInfo(  # noqa: N802 - named by the proto
        self,
        request: gateway_pb2.GetInfoRequest,  # noqa: ARG002 - has no fields
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> gateway_pb2.GetInfoResponse:
        pool = self._backend.pool
        workers = await asyncio.gather(*(_worker_info(worker) for worker in pool.workers))
        decode = next((w.status for w in pool.workers if w.role is Role.DECODE and w.status), None)
        return gateway_pb2.GetInfoResponse(
            version=_version(),
            model=decode.model if decode else self._model,
            max_model_len=pool.max_model_len or 0,
            tree=decode.tree if decode else "",
            workers=workers,
            active_requests=self.active_requests,
        )

    def _samples(self, entries: Sequence[JournalEntry], send: Write) -> list[Sample]:
        sending = asyncio.Lock()

        async def write(response: gateway_pb2.GenerateResponse) -> None:
            async with sending:  # gRPC takes one message at a time
                await send(response)

        return [
            Sample(index, entry, Output(self._tokens.detokenizer(), entry.stop), write)
            for index, entry in enumerate(entries)
        ]

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.active_requests >= self._config.max_requests:
            raise RpcFailure(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"the gateway serves {self.active_requests} requests already"
            )
        self.active_requests += 1
        try:
            yield
        finally:
            self.active_requests -= 1

    def _limits(self) -> Limits:
        max_model_len = self._backend.pool.max_model_len
        if max_model_len is None:
            raise RpcFailure(grpc.StatusCode.UNAVAILABLE, "no worker has been seen yet")
        return Limits(max_model_len=max_model_len, max_tokens=self._config.max_tokens_limit)


async def _worker_info(worker: Worker) -> gateway_pb2.WorkerInfo:
    """What the worker says now, and whether requests go to it. Nothing is said of the load of one that does not
    answer: it may be long gone.
    """
    try:
        status = await worker.fetch_status(STATUS_TIMEOUT_S)
    except (RpcFailure, InvalidRequestError) as error:
        logger.info("%s: no status: %s", worker, error)
        return gateway_pb2.WorkerInfo(role=worker.role, address=worker.address, healthy=False)
    return gateway_pb2.WorkerInfo(
        role=worker.role,
        address=worker.address,
        healthy=worker.healthy,
        blocks_total=status.blocks_total,
        blocks_used=status.blocks_used,
        requests=status.requests,
        tasks=status.tasks,
    )


def _answer_s(remaining: float) -> float:
    """How long before its own deadline a client is answered: it should hear why, not just that its time is up."""
    return min(_ANSWER_S, remaining / 10)


def _deadline_passed() -> RpcFailure:
    return RpcFailure(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request was read")


def _version() -> str:
    try:
        return importlib.metadata.version("branchline")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+source"
