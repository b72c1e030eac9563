"""The workers' side of the gateway, shared by all requests."""

from __future__ import annotations

from branchline.config import GatewayConfig
from branchline.wire.tls import ChannelTls
from gateway.leases import Leases
from gateway.placement import Placer
from gateway.pool import WorkerPool


class Backend:
    """Who the workers are, what is leased from them, and who is next. Belongs to one event loop."""

    def __init__(self, config: GatewayConfig, tls: ChannelTls | None = None) -> None:
        """`tls`: of the connections to workers; None for plain text."""
        self.config = config
        self.pool = WorkerPool(tls)
        self.leases = Leases(self.pool)
        self.placer = Placer(self.pool, self.leases, patience_s=config.worker_wait_s)

    async def close(self) -> None:
        """Gives back what is leased and closes all connections."""
        await self.leases.close()
        await self.pool.close()
