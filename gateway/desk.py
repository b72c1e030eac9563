"""All that front ends need, put together once for the gRPC service and the HTTP one."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.backend import Backend
from gateway.chat import Chats
from gateway.door import Door
from gateway.generation import Generator
from gateway.info import Info
from gateway.keys import Keyring
from gateway.parsing import Parsers, PlainText
from gateway.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Desk:
    """Belongs to one event loop."""

    door: Door
    generator: Generator
    chats: Chats
    info: Info

    @classmethod
    def make(
        cls,
        backend: Backend,
        tokens: Tokens,
        model: str,
        parsers: Parsers | None = None,
        keyring: Keyring | None = None,
    ) -> Desk:
        """`model` is the configured one; without a `keyring` nobody needs a key."""
        door = Door(backend.config, keyring)
        generator = Generator(backend, tokens, door)
        return cls(door, generator, Chats(generator, parsers or PlainText()), Info(backend, door, model))

    @property
    def tokens(self) -> Tokens:
        return self.generator.tokens
