"""Tells the gateways where the workers are."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from cluster.actors import News
from cluster.member import Member
from cluster.shell import State


class Announcer:
    """Belongs to the supervisor's thread."""

    def __init__(self) -> None:
        self.current = News()

    def announce(self, members: Sequence[Member]) -> None:
        """Tells every gateway what it has not been told yet. Those that aren't told to serve yet hear it then."""
        news = news_of(members)
        if news != self.current:
            self.current = news
        for gateway in members:
            if gateway.role == "gateway" and gateway.state in (State.LOADING, State.READY):
                self.tell(gateway)

    def tell(self, gateway: Member) -> None:
        if gateway.told != self.current:
            gateway.told, gateway.heard = self.current, gateway.actor.update_workers.remote(self.current)

    def everybody_knows(self, members: Sequence[Member]) -> bool:
        """Whether each gateway that is ready has heard the current news."""
        gateways = [member for member in members if member.role == "gateway" and member.ready]
        if any(gateway.told != self.current for gateway in gateways):
            return False
        waited_for = [gateway.heard for gateway in gateways if gateway.heard is not None]
        if not waited_for:
            return True
        done, _ = ray.wait(waited_for, num_returns=len(waited_for), timeout=0)
        return len(done) == len(waited_for)


def news_of(members: Sequence[Member]) -> News:
    """Workers stay at an address, as far as gateways know, until they are dropped or are ready at another one."""
    there = [m for m in members if m.address and (m.leaving is None or m.leaving.dropped_at is None)]
    prefill, decode = (
        tuple((m.seat.model, m.address) for m in there if m.role == role) for role in ("prefill", "decode")
    )
    draining = tuple(m.address for m in there if m.leaving is not None and m.role != "gateway")
    return News(prefill, decode, draining)
