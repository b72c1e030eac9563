"""The life cycle of a gRPC server: bind, serve with health and reflection, stop within a deadline."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from branchline.wire.channels import SERVER_OPTIONS
from branchline.wire.handlers import CallCounter, Ended, Guard, HandlerInterceptor

#: Seconds that cancelled handlers have for their `finally` blocks.
_CLEANUP_S = 5.0


class BindError(OSError):
    """The server cannot listen where it should; the message says where and why."""


class PortInUseError(BindError):
    """Somebody else listens there."""


class RpcServer:
    """Branchline's servicers behind one port. Use it from one event loop:

        server = RpcServer("127.0.0.1", 0)
        server.add("branchline.v1.GatewayService", servicer, add_GatewayServiceServicer_to_server)
        address = await server.start()
        ...
        await server.stop(grace_s=5.0)

    Errors that handlers raise become status codes (`branchline.wire.handlers`). The health service answers for
    each service by its full name and for "" (all).
    """

    def __init__(
        self,
        host: str,
        port: int,
        credentials: grpc.ServerCredentials | None = None,
        max_calls: int | None = None,
    ) -> None:
        """Without `credentials` it is plain text. More than `max_calls` at once, health checks and all, are refused
        with RESOURCE_EXHAUSTED; None sets no bound.
        """
        self._max_calls = max_calls
        self._host = host
        self._port = port
        self._credentials = credentials
        self._services: list[tuple[str, Any, Callable[[Any, Any], None]]] = []
        self._parsers: dict[str, Callable[[bytes], Any]] = {}
        self._guards: dict[str, Guard] = {}
        self._ended: dict[str, Ended] = {}
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._calls = CallCounter()
        self._stopping = asyncio.Lock()

    def add(
        self,
        service: str,
        servicer: object,
        add_to_server: Callable[[Any, Any], None],
        parsers: Mapping[str, Callable[[bytes], Any]] | None = None,
        guard: Guard | None = None,
        ended: Ended | None = None,
    ) -> None:
        """Adds a servicer under its full protobuf name, with the generated function that registers it. `parsers`: by
        method, what parses its requests in place of the generated class; raises DecodeError like that one.
        `guard` may refuse calls before they are parsed; `ended` is told how each one ends, refused ones too.
        """
        if self._server is not None:
            raise RuntimeError("services must be added before start()")
        self._services.append((service, servicer, add_to_server))
        if guard is not None:
            self._guards[service] = guard
        if ended is not None:
            self._ended[service] = ended
        self._parsers.update({f"/{service}/{method}": parser for method, parser in (parsers or {}).items()})

    @property
    def running_calls(self) -> int:
        """Handlers that run now; health checks and reflection don't count."""
        return self._calls.running

    async def start(self) -> str:
        """Binds, serves, and returns HOST:PORT with the real port. Raises PortInUseError or BindError."""
        if self._server is not None or self._calls.refusing:
            raise RuntimeError("a server can be started once")
        interceptor = HandlerInterceptor(self._calls, self._parsers, self._guards, self._ended)
        server = grpc.aio.server(
            interceptors=[interceptor], options=SERVER_OPTIONS, maximum_concurrent_rpcs=self._max_calls
        )
        for _, servicer, add_to_server in self._services:
            add_to_server(servicer, server)
        names = [name for name, _, _ in self._services]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        address = _bind(server, self._host, self._port, self._credentials)
        await server.start()
        self._server = server
        await self.set_serving(True)
        return address

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers from now on."""
        response = health_pb2.HealthCheckResponse
        for name in ("", *(name for name, _, _ in self._services)):
            await self._health.set(name, response.SERVING if serving else response.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls at once, lets running ones end for `grace_s`, then cancels them. Idempotent.

        Returns when the handlers have ended, their cleanup included. Raises TimeoutError for handlers that don't.
        """
        async with self._stopping:
            if self._server is None:
                return
            await self._health.enter_graceful_shutdown()
            self._calls.refuse()
            await self._calls.wait_idle(grace_s)
            # Only now, and once: gRPC's own grace would wait for health watchers, which never end, and a second
            # stop() while its grace runs out crashes the process (seen in grpcio 1.85.1).
            await self._server.stop(None)
            self._server = None
        if not await self._calls.wait_idle(_CLEANUP_S):
            raise TimeoutError(f"{self._calls.running} handlers have not ended {_CLEANUP_S:g} s after the stop")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there. Raises BindError."""
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in _addresses(host, 0))


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> str:
    _require_free(host, port)
    where = f"[{host}]" if ":" in host else host
    try:
        if credentials is None:
            bound: int = server.add_insecure_port(f"{where}:{port}")
        else:
            bound = server.add_secure_port(f"{where}:{port}", credentials)
    except RuntimeError as error:  # somebody was faster
        raise BindError(f"cannot listen on {where}:{port}") from error
    return f"{where}:{bound}"


def _addresses(host: str, port: int) -> list[Any]:
    """What the host's name stands for, as `socket.getaddrinfo` has it. Raises BindError."""
    try:
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except socket.gaierror as error:
        raise BindError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _require_free(host: str, port: int) -> None:
    """Asks the kernel: gRPC's error names no reason, and there is none at all while any one of the addresses that
    `host` stands for (`localhost`: IPv4 and IPv6) is free.
    """
    addresses = _addresses(host, port)
    refusals: list[OSError] = []
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: TIME_WAIT is free
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(f"port {port} on {host} is in use by another process") from error
            refusals.append(error)
    if len(refusals) == len(addresses):  # a machine without IPv6 refuses one of two, which is fine
        raise BindError(f"cannot listen on {host}:{port}: {refusals[0].strerror}") from refusals[0]
