"""What a gateway says of itself and of its workers."""

from __future__ import annotations

import asyncio
import logging
import time

from branchline.core import InvalidRequestError
from branchline.observe.metrics import version
from branchline.v1 import gateway_pb2
from branchline.wire.status import RpcFailure
from gateway.backend import Backend
from gateway.door import Door, Guest, Visit
from gateway.worker import Role, Worker

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 2.0


class Info:
    """Belongs to one event loop. `model` is the configured one."""

    def __init__(self, backend: Backend, door: Door, model: str) -> None:
        self._pool = backend.pool
        self._served = backend.config.served_model_name
        self._door = door
        self._configured = model

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the model that is served: first the one to show, which is the configured `served_model_name` or
        the one that its workers give; then others that mean it, too.
        """
        decode = next((w.status for w in self._pool.workers if w.role is Role.DECODE and w.status), None)
        names = (self._served, decode.model if decode else "", self._configured)
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def max_model_len(self) -> int:
        """0 before any worker has answered."""
        return self._pool.max_model_len or 0

    @property
    def can_serve(self) -> bool:
        """Whether there is a prefill and a decode worker that fit together."""
        return bool(self._pool.pairs().fitting)

    async def system(self) -> gateway_pb2.GetInfoResponse:
        workers = await asyncio.gather(*(_worker_info(worker) for worker in self._pool.workers))
        decode = next((w.status for w in self._pool.workers if w.role is Role.DECODE and w.status), None)
        return gateway_pb2.GetInfoResponse(
            version=version(),
            model=self.models[0],
            max_model_len=self.max_model_len,
            tree=decode.tree if decode else "",
            workers=workers,
            active_requests=self._door.active_requests,
        )

    def status(self, guest: Guest) -> gateway_pb2.GetStatusResponse:
        now = time.monotonic()
        return gateway_pb2.GetStatusResponse(
            requests=[_request_status(visit, now) for visit in self._door.visits_for(guest)],
            max_requests=self._door.max_requests,
        )


def _request_status(visit: Visit, now: float) -> gateway_pb2.RequestStatus:
    first = [entry for entry in visit.entries if entry.sampling.sample_index == 0]
    return gateway_pb2.RequestStatus(
        request_id=visit.request_id,
        interface=visit.call.interface,
        age_s=now - visit.arrived,
        prompt_tokens=visit.prompt_tokens,
        completion_tokens=visit.completion_tokens,
        samples=len(visit.entries),
        priority=first[0].priority if first else 0,
    )


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
