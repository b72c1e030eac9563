"""The workers' side of the gateway, shared by all requests."""

from __future__ import annotations

import functools

from branchline.config import EngineConfig, GatewayConfig
from branchline.wire.tls import ChannelTls
from gateway.leases import Leases
from gateway.placement import Placer
from gateway.pool import Connect, WorkerPool
from gateway.routing import make_policy
from gateway.worker import Worker


class Backend:
    """Who the workers are, what is leased from them, and who is next. Belongs to one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        tls: ChannelTls | None = None,
        *,
        block_size: int = EngineConfig.block_size,
        connect: Connect | None = None,
    ) -> None:
        """`tls`: of the connections to workers; None for plain text. `block_size`: of their KV, in tokens. `connect`:
        makes workers, in place of those over gRPC.
        """
        self.config = config
        self.pool = WorkerPool(connect or functools.partial(Worker, tls=tls))
        self.leases = Leases(self.pool)
        self.policy = make_policy(config, block_size)
        self.placer = Placer(self.pool, self.leases, self.policy, patience_s=config.worker_wait_s)

    async def close(self) -> None:
        """Gives back what is leased and closes all connections."""
        await self.leases.close()
        await self.pool.close()
