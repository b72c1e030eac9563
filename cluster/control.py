"""The control of a running system: what the supervisor sees and does, over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
import yaml

from branchline.config import Config, ConfigError
from branchline.observe.metrics import version
from branchline.v1 import control_pb2, control_pb2_grpc
from branchline.wire.server import RpcServer, is_loopback
from branchline.wire.status import RpcFailure
from branchline.wire.tls import inside_files, server_credentials
from cluster import steering
from cluster.member import Member
from cluster.orders import EndedError, RefusedError, UnknownError
from cluster.placement import ROLES
from cluster.shell import RoleThread, State
from cluster.supervisor import StartError, Supervisor

SERVICE = "branchline.v1.ControlService"
#: Seconds that the supervisor has to get round to an order; it looks four times a second.
ORDER_TIMEOUT_S = 10.0
#: Seconds to begin to listen, and to end.
SERVE_TIMEOUT_S = 30.0

T = TypeVar("T")


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Every call becomes an order, so that the supervisor's state is seen and changed by its own thread alone."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def GetCluster(  # noqa: N802 - as the contract has it
        self, _request: control_pb2.GetClusterRequest, _context: Any
    ) -> control_pb2.GetClusterResponse:
        return await self._ordered(lambda: view(self._supervisor))

    async def Scale(  # noqa: N802 - as the contract has it
        self, request: control_pb2.ScaleRequest, _context: Any
    ) -> control_pb2.ScaleResponse:
        counts = {role: getattr(request, role) for role in ROLES if request.HasField(role)}
        for role, count in counts.items():
            if count < 1:
                raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, f"{role}: must be at least 1, got {count}")
        grace_s = request.grace_ms / 1000
        added, draining = await self._ordered(lambda: steering.scale(self._supervisor, counts, grace_s, request.model))
        return control_pb2.ScaleResponse(added=added, draining=draining)

    async def Drain(  # noqa: N802 - as the contract has it
        self, request: control_pb2.DrainRequest, _context: Any
    ) -> control_pb2.DrainResponse:
        await self._ordered(lambda: steering.drain(self._supervisor, request.id, request.grace_ms / 1000))
        return control_pb2.DrainResponse()

    async def Update(  # noqa: N802 - as the contract has it
        self, request: control_pb2.UpdateRequest, _context: Any
    ) -> control_pb2.UpdateResponse:
        try:
            changes = {name: yaml.safe_load(text) for name, text in request.changes.items()}
        except yaml.YAMLError as error:
            raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, f"not valid YAML: {error}") from None
        grace_s = request.grace_ms / 1000
        revision = await self._ordered(lambda: steering.update(self._supervisor, changes, grace_s))
        return control_pb2.UpdateResponse(revision=revision)

    async def Stop(  # noqa: N802 - as the contract has it
        self, request: control_pb2.StopRequest, _context: Any
    ) -> control_pb2.StopResponse:
        await self._ordered(lambda: self._supervisor.ask_to_stop(request.grace_ms / 1000))
        return control_pb2.StopResponse()

    async def _ordered(self, work: Callable[[], T]) -> T:
        future = self._supervisor.orders.give(work)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), ORDER_TIMEOUT_S)
        except TimeoutError:
            raise RpcFailure(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the supervisor was busy for {ORDER_TIMEOUT_S:g} s"
            ) from None
        except RefusedError as error:
            raise RpcFailure(_CODES.get(type(error), grpc.StatusCode.FAILED_PRECONDITION), str(error)) from None


_CODES = {UnknownError: grpc.StatusCode.NOT_FOUND, EndedError: grpc.StatusCode.UNAVAILABLE}


def view(supervisor: Supervisor) -> control_pb2.GetClusterResponse:
    now, rollout = time.monotonic(), supervisor.rollout
    update = None
    if rollout is not None:
        update = control_pb2.UpdateProgress(state=rollout.phase, detail=rollout.detail(supervisor.roster))
    return control_pb2.GetClusterResponse(
        state=supervisor.phase,
        version=version(),
        model=supervisor.roster.plan.config.model.model,
        uptime_s=now - supervisor.began,
        processes=[_process(member, now) for member in supervisor.members],
        update=update,
    )


def _process(member: Member, now: float) -> control_pb2.ClusterProcess:
    process = control_pb2.ClusterProcess(
        id=member.name,
        role=member.role,
        state=member.condition(now),
        detail=member.detail(now),
        address=member.address,
        http_address=member.http,
        restarts=member.deaths,
        cores=member.cores,
        revision=member.seat.revision,
        model=member.seat.model,
    )
    if member.info is not None:
        process.node, process.pid = member.info.node_ip, member.info.pid
    if (load := member.load) is not None:
        process.running, process.queued = load.running, load.queued
        process.blocks_used, process.blocks_total = load.blocks_used, load.blocks_total
        process.tokens_per_s = member.rate.per_s
        process.acceptance_length = load.speculation.acceptance_length
    return process


async def serve(
    config: Config,
    *,
    ready: Callable[[str], None],
    stop: asyncio.Event,
    supervisor: Supervisor,
    **_hooks: object,
) -> None:
    """Serves until `stop` is set. Raises ConfigError or BindError."""
    inside = None
    if not is_loopback(config.control.host):
        inside = inside_files(config.security.inside)
        if inside is None:
            raise ConfigError(
                f"control.host: {config.control.host} is open to other machines: that needs security.inside, "
                "or whoever reaches it can end the system"
            )
    server = RpcServer(config.control.host, config.control.port, server_credentials(inside))
    server.add(SERVICE, ControlServicer(supervisor), control_pb2_grpc.add_ControlServiceServicer_to_server)
    ready(await server.start())
    try:
        await stop.wait()
    finally:
        await server.stop(grace_s=1.0)


@contextlib.contextmanager
def controlled(supervisor: Supervisor, config: Config) -> Iterator[str]:
    """Serves on a thread of its own; yields HOST:PORT, empty where nothing is served. Raises StartError."""
    if config.control.port < 0:
        yield ""
        return
    thread = RoleThread(f"{__name__}:{serve.__name__}")
    thread.start(config, supervisor=supervisor)
    try:
        yield _address(thread)
    finally:
        thread.stop(SERVE_TIMEOUT_S)


def _address(thread: RoleThread) -> str:
    deadline = time.monotonic() + SERVE_TIMEOUT_S
    while (status := thread.status()).state is State.LOADING and time.monotonic() < deadline:
        time.sleep(0.01)
    if status.state is not State.READY:
        raise StartError(f"control: {status.error or 'did not begin to listen'}", user_error=status.user_error)
    return status.address
