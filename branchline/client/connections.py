"""A client's connections, one to each gateway that it has talked to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from branchline.client import transport
from branchline.client.errors import BranchlineError, UnavailableError
from branchline.client.recovery import Recovery
from branchline.client.tls import Keyed, Tls, check_key
from branchline.v1 import gateway_pb2_grpc


@dataclass(frozen=True, slots=True)
class Connection:
    """To one gateway: gRPC's channel, and what calls go through."""

    target: str
    channel: Any
    stub: Any
    check_health: Any


class Connections:
    """What both clients have below their calls. Safe to share between threads."""

    def __init__(
        self,
        target: str,
        grpc_api: Any,
        mapped_errors: Callable[[str], contextlib.AbstractContextManager[None]],
        *,
        api_key: str | None,
        tls: Tls | None,
    ) -> None:
        """`grpc_api` makes the channels: the module `grpc`, or `grpc.aio`. `mapped_errors(target)` goes around calls.

        Raises InvalidRequestError.
        """
        self._gateways = transport.Gateways(target)
        self._api = grpc_api
        self._mapped_errors = mapped_errors
        self._key, self._tls = check_key(api_key), tls
        self._credentials = tls.credentials() if tls else None
        self._lock = threading.Lock()
        self._connections: dict[str, Connection] = {}
        self._closed = False

    def close(self) -> list[Any]:
        """The channels, for the client to close; there will be no more."""
        with self._lock:
            self._closed = True
            return [connection.channel for connection in self._connections.values()]

    def current(self) -> Connection:
        """To the gateway to ask now; opened when it is used first, on the event loop that runs then."""
        with self._lock:
            if self._closed:
                raise BranchlineError("the client is closed", "CANCELLED")
            target = self._gateways.current
            if target not in self._connections:
                self._connections[target] = self._open(target)
            return self._connections[target]

    @contextlib.contextmanager
    def asking(self) -> Iterator[Connection]:
        """Around a call that has one answer."""
        connection = self.current()
        try:
            with self._mapped_errors(connection.target):
                yield connection
        except UnavailableError:
            self._gateways.leave(connection.target)
            raise

    def start(
        self, method: str, recovery: Recovery[Any], metadata: transport.Metadata, failed: str | None
    ) -> tuple[Any, str]:
        """A call of the stub's method, and to whom; `failed` is who had it before and is not available any more."""
        if failed is not None:
            self._gateways.leave(failed)
        connection = self.current()
        call = getattr(connection.stub, method)
        return call(recovery.request(), timeout=recovery.timeout_s, metadata=metadata), connection.target

    def _open(self, target: str) -> Connection:
        options = transport.channel_options(target)
        if self._tls is None:
            channel = self._api.insecure_channel(target, options=options)
        else:
            options = [*options, *self._tls.options]
            channel = self._api.secure_channel(target, self._credentials, options=options)
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(Keyed(channel, self._key) if self._key else channel)
        return Connection(target, channel, stub, channel.unary_unary(transport.HEALTH_METHOD))
