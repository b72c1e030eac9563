"""All that front ends need, put together once for the gRPC service and the HTTP one."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from branchline.observe.tracing import NoTracer, Tracer
from gateway.backend import Backend
from gateway.chat import Chats
from gateway.door import Door
from gateway.generation import Generator
from gateway.info import Info
from gateway.keys import Keyring
from gateway.metrics import Counts, gateway_registry
from gateway.parsing import Parsers, PlainText
from gateway.tokens import Tokens
from gateway.watch import Watch


@dataclass(frozen=True, slots=True)
class Desk:
    """Belongs to one event loop."""

    door: Door
    generator: Generator
    chats: Chats
    info: Info
    #: What the interfaces count in; the gateway's metrics are made of it.
    counts: Counts
    registry: CollectorRegistry

    @classmethod
    def make(
        cls,
        backend: Backend,
        tokens: Tokens,
        model: str,
        parsers: Parsers | None = None,
        keyring: Keyring | None = None,
        tracer: Tracer | None = None,
    ) -> Desk:
        """`model` is the configured one; without a `keyring` nobody needs a key."""
        door, counts = Door(backend.config, keyring), Counts()
        generator = Generator(backend, tokens, door, Watch(tracer or NoTracer(), counts))
        chats, info = Chats(generator, parsers or PlainText()), Info(backend, door, model)
        return cls(door, generator, chats, info, counts, gateway_registry(backend, door, counts))

    @property
    def tokens(self) -> Tokens:
        return self.generator.tokens
