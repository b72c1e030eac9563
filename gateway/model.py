"""One model that is served: its workers, its tokens, and what generates with them."""

from __future__ import annotations

from dataclasses import dataclass

from branchline.v1 import gateway_pb2
from gateway.backend import Backend
from gateway.chat import Chats
from gateway.generation import Generator
from gateway.tokens import Tokens
from gateway.worker import Role


@dataclass(frozen=True, slots=True)
class Model:
    """Belongs to one event loop. `configured` is what the configuration calls it: a directory, an id, or `default`."""

    configured: str
    backend: Backend
    generator: Generator
    chats: Chats

    @property
    def tokens(self) -> Tokens:
        return self.generator.tokens

    @property
    def names(self) -> tuple[str, ...]:
        """First the one to show, which is the configured `served_model_name` or the one that its workers give; then
        others that mean it, too.
        """
        said = (w.status.model for w in self.backend.pool.workers if w.role is Role.DECODE and w.status)
        names = (self.backend.config.served_model_name, next(said, ""), self.configured)
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def label(self) -> str:
        """What metrics call it: unlike `name` it is the same before a worker has answered."""
        return self.backend.config.served_model_name or self.configured

    @property
    def max_model_len(self) -> int:
        """0 before any worker has answered."""
        return self.backend.pool.max_model_len or 0

    @property
    def tree(self) -> str:
        """Empty before a decode worker has answered."""
        return next((w.status.tree for w in self.backend.pool.workers if w.role is Role.DECODE and w.status), "")

    @property
    def can_serve(self) -> bool:
        """Whether there is a prefill and a decode worker that fit together."""
        return bool(self.backend.pool.pairs().fitting)

    def as_proto(self) -> gateway_pb2.ModelInfo:
        name, *aliases = self.names
        return gateway_pb2.ModelInfo(id=name, max_model_len=self.max_model_len, aliases=aliases)

    async def close(self) -> None:
        """Gives back what is leased, closes all connections and ends the tokenizer's thread."""
        await self.backend.close()
        self.tokens.close()
