"""One worker as the gateway sees it: a channel, the last known status, and how much is asked of it."""

from __future__ import annotations

import asyncio
import enum
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from branchline.core import Fingerprint
from branchline.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from branchline.wire import convert
from branchline.wire.channels import open_channel
from branchline.wire.status import RpcFailure
from branchline.wire.tls import ChannelTls


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker said of itself. `requests` are those queued or running there, of all gateways;
    `tokens` those prefilled or emitted since its start."""

    incarnation: str
    fingerprint: Fingerprint
    model: str
    max_model_len: int
    blocks_total: int
    blocks_used: int
    requests: int
    tasks: int
    tree: str
    tokens: int
    #: Requests that a decode worker runs together at most; 0 of a prefill worker.
    max_batch: int = 0


class Worker:
    """`status` is the last answer to GetStatus; the worker is `healthy` while the last one was good.

    `in_flight` counts this gateway's own requests on it, `waiting_tokens` those tokens of their contexts that a prefill
    worker has yet to compute, as far as is known here, and `others` the requests of other gateways. Calls that fail
    raise RpcFailure with the worker's status, or CANCELLED when the worker was dropped from the pool meanwhile;
    cancelling the caller cancels the call.
    """

    def __init__(self, role: Role, address: str, tls: ChannelTls | None = None) -> None:
        self.role = role
        self.address = address
        self.status: WorkerStatus | None = None
        self.healthy = False
        #: It finishes what it has and is given nothing new.
        self.draining = False
        self.in_flight = 0
        self.waiting_tokens = 0
        self.others = 0
        self._avoid_until = 0.0
        self._progress_at = -math.inf
        self._channel = open_channel(address, tls=tls)
        stub = prefill_pb2_grpc.PrefillServiceStub if role is Role.PREFILL else decode_pb2_grpc.DecodeServiceStub
        self._stub: Any = stub(self._channel)  # generated stubs carry no types

    def __repr__(self) -> str:
        return f"{self.role} worker {self.address}"

    async def close(self) -> None:
        """Ends the calls that use the channel with CANCELLED."""
        await self._channel.close()

    async def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """One request, one response."""
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise _failure(error) from error

    async def stream(
        self, method: str, request: Any, timeout_s: float, metadata: Sequence[tuple[str, str]] = ()
    ) -> AsyncGenerator[Any]:
        """One request, many responses. Close the generator (`contextlib.aclosing`): that cancels the call."""
        call = None
        try:
            call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)
            async for response in call:
                yield response
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise _failure(error) from error
        finally:
            if call is not None:
                call.cancel()

    async def fetch_status(self, timeout_s: float) -> WorkerStatus:
        """Asks the worker now. Raises RpcFailure, or InvalidRequestError for an answer without sense."""
        if self.role is Role.PREFILL:
            request: Any = prefill_pb2.PrefillServiceGetStatusRequest()
        else:
            request = decode_pb2.DecodeServiceGetStatusRequest()
        answer = await self.call("GetStatus", request, timeout_s)
        return WorkerStatus(
            incarnation=answer.incarnation,
            fingerprint=convert.fingerprint_from_proto(answer.fingerprint),
            model=answer.model,
            max_model_len=answer.max_model_len,
            blocks_total=answer.blocks_total,
            blocks_used=answer.blocks_used,
            requests=answer.queued if self.role is Role.PREFILL else answer.leases,
            tasks=answer.tasks,
            tree="" if self.role is Role.PREFILL else answer.tree,
            tokens=answer.prefilled_tokens if self.role is Role.PREFILL else answer.emitted_tokens,
            max_batch=0 if self.role is Role.PREFILL else answer.max_batch,
        )

    def update(self, status: WorkerStatus) -> None:
        if self.status and status.tokens != self.status.tokens:
            self._progress_at = time.monotonic()
        self.status = status
        self.healthy = True
        self.others = max(0, status.requests - self.in_flight)

    def avoid(self, seconds: float) -> None:
        """Prefer others for a while."""
        self._avoid_until = time.monotonic() + seconds

    def progressed_within(self, seconds: float) -> bool:
        """Whether it has computed anything, for anybody, as far as polls have seen."""
        return time.monotonic() - self._progress_at <= seconds

    @property
    def avoided(self) -> bool:
        """It failed lately."""
        return time.monotonic() < self._avoid_until

    @property
    def load(self) -> int:
        """Requests on it: exact for this gateway's own, up to a poll old for those of others."""
        return self.in_flight + self.others


def _failure(error: BaseException) -> RpcFailure:
    """What a failed call means. Raises `error` itself when it is the cancellation of the task that calls."""
    match error:
        case grpc.aio.AioRpcError():
            return RpcFailure(error.code(), error.details() or "(no details)")
        case asyncio.CancelledError():
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise error
    # The call was cancelled, not the task, or it was begun on a closed channel.
    return RpcFailure(grpc.StatusCode.CANCELLED, "the connection was closed")
