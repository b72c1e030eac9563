"""What a gateway says of itself and of its workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from branchline.core import InvalidRequestError
from branchline.observe.metrics import version
from branchline.v1 import gateway_pb2
from branchline.wire.status import RpcFailure
from gateway.door import Door, Guest, Visit
from gateway.model import Model
from gateway.worker import Worker

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 2.0


class Info:
    """Belongs to one event loop. `models`: the desk's own list, the first of which answers for the whole."""

    def __init__(self, models: Sequence[Model], door: Door) -> None:
        self._models = models
        self._door = door

    async def system(self) -> gateway_pb2.GetInfoResponse:
        asked = [_worker_info(worker, model.name) for model in self._models for worker in model.backend.pool.workers]
        workers = await asyncio.gather(*asked)
        first = self._models[0]
        return gateway_pb2.GetInfoResponse(
            version=version(),
            model=first.name,
            max_model_len=first.max_model_len,
            tree=first.tree,
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


async def _worker_info(worker: Worker, model: str) -> gateway_pb2.WorkerInfo:
    """What the worker says now, and whether requests go to it. Nothing is said of the load of one that does not
    answer: it may be long gone.
    """
    try:
        status = await worker.fetch_status(STATUS_TIMEOUT_S)
    except (RpcFailure, InvalidRequestError) as error:
        logger.info("%s: no status: %s", worker, error)
        return gateway_pb2.WorkerInfo(role=worker.role, address=worker.address, healthy=False, model=model)
    return gateway_pb2.WorkerInfo(
        role=worker.role,
        address=worker.address,
        healthy=worker.healthy,
        blocks_total=status.blocks_total,
        blocks_used=status.blocks_used,
        requests=status.requests,
        tasks=status.tasks,
        model=model,
    )
