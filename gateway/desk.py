"""All that front ends need, put together once for the gRPC service and the HTTP one."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc
from prometheus_client import CollectorRegistry

from branchline.config import GatewayConfig
from branchline.observe.tracing import NoTracer, Tracer
from branchline.wire.status import RpcFailure
from gateway.backend import Backend
from gateway.chat import Chats
from gateway.door import Door
from gateway.generation import Generator
from gateway.info import Info
from gateway.keys import Keyring
from gateway.metrics import Counts, gateway_registry
from gateway.model import Model
from gateway.parsing import Parsers, PlainText
from gateway.tokens import Tokens
from gateway.watch import Watch


@dataclass(frozen=True, slots=True)
class Desk:
    """Belongs to one event loop. All models share one door, and are counted together."""

    door: Door
    info: Info
    #: What the interfaces count in; the gateway's metrics are made of it.
    counts: Counts
    registry: CollectorRegistry
    #: The first is the one of requests that name none.
    models: list[Model] = field(default_factory=list)
    _tracer: Tracer = field(default_factory=NoTracer)

    @classmethod
    def make(cls, config: GatewayConfig, keyring: Keyring | None = None, tracer: Tracer | None = None) -> Desk:
        """Without models; without a `keyring` nobody needs a key."""
        door, counts, models = Door(config, keyring), Counts(), list[Model]()
        registry = gateway_registry(models, door, counts)
        return cls(door, Info(models, door), counts, registry, models, tracer or NoTracer())

    def add(self, configured: str, backend: Backend, tokens: Tokens, parsers: Parsers | None = None) -> Model:
        """One more to serve."""
        generator = Generator(backend, tokens, self.door, Watch(self._tracer, self.counts))
        model = Model(configured, backend, generator, Chats(generator, parsers or PlainText()))
        self.models.append(model)
        return model

    def model(self, name: str) -> Model:
        """The one of that name, the first one for "". Raises RpcFailure NOT_FOUND."""
        if not name:
            return self.models[0]
        for model in self.models:
            if name in model.names:
                return model
        served = ", ".join(model.name for model in self.models)
        raise RpcFailure(grpc.StatusCode.NOT_FOUND, f"the model {name[:200]!r} is not served here; served are {served}")

    @property
    def can_serve(self) -> bool:
        """Whether one of the models has workers that fit together. Requests for another one hear that it has none."""
        return any(model.can_serve for model in self.models)
