"""Starts the actors of a system, watches them, and ends them.

One thread, one loop: each round asks every actor for its status and does what the answers call for. An actor
that Ray has restarted answers that it is idle, and is told to serve again; when its address has changed, the
gateways hear of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RuntimeEnvSetupError

from cluster.placement import Seat, create_actor, needed_resources
from cluster.shell import State, Status

#: Seconds that a round waits for answers; an actor may answer in a later round.
ROUND_S = 0.25
#: Processes of one actor that may die before it has ever been ready.
MAX_DEATHS_AT_START = 2
#: Seconds before a failed actor is started again: doubled each time, up to the second figure.
RESTART_DELAYS_S = (1.0, 30.0)
#: Seconds without news while starting after which it is told what is being waited for.
SILENCE_S = 5.0
#: Seconds for an actor that is ready to say where it runs.
INFO_TIMEOUT_S = 30.0
LOOPBACK_PREFIXES = ("127.", "localhost:", "[::1]:")

Report = Callable[[str], None]
Stopping = Callable[[], bool]


class StartError(RuntimeError):
    """The system could not be started. `user_error`: a wrong configuration, model or port."""

    def __init__(self, message: str, *, user_error: bool = False) -> None:
        super().__init__(message)
        self.user_error = user_error


class StartInterruptedError(RuntimeError):
    """The start was given up because somebody asked to stop."""


@dataclass
class Member:
    """One actor as the supervisor sees it."""

    seat: Seat
    actor: Any
    state: State | None = None
    address: str = ""
    #: Of a gateway's HTTP API.
    http: str = ""
    #: The request for a status that is under way.
    pending: Any = None
    next_line: int = 0
    deaths: int = 0
    failures: int = 0
    not_before: float = 0.0

    @property
    def ready(self) -> bool:
        return self.state is State.READY


@dataclass
class Supervisor:
    """Owns the actors of one system. Use from one thread; `close` is safe at any point."""

    seats: Sequence[Seat]
    env: Mapping[str, str]
    report: Report
    members: list[Member] = field(default_factory=list)
    _announced: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    _last_news: float = field(default_factory=time.monotonic)

    def start(self, timeout_s: float, stopping: Stopping = lambda: False) -> list[str]:
        """Starts all actors and returns the gateways' addresses once all are ready. Raises StartError."""
        deadline = time.monotonic() + timeout_s
        for seat in self.seats:
            self.members.append(Member(seat, create_actor(seat, self.env)))
        self._await_ready(deadline, stopping)
        self._check_hosts()
        return [gateway.address for gateway in self._of("gateway")]

    @property
    def http(self) -> list[str]:
        """The addresses of the gateways' HTTP APIs, in the gateways' order; none where none is served."""
        return [gateway.http for gateway in self._of("gateway") if gateway.http]

    def watch(self, stopping: Stopping) -> None:
        """Keeps the system going until told to stop."""
        while not stopping():
            self.round()

    def round(self) -> None:
        """One look at every actor; restarts what has failed and tells gateways about new addresses."""
        self._poll()
        for member in self.members:
            if member.state is State.FAILED:
                self._restart_process(member)

    def close(self, grace_s: float) -> None:
        """Ends all actors, gateways first: politely within `grace_s` seconds in all, then by force."""
        deadline = time.monotonic() + grace_s
        for roles in (("gateway",), ("prefill", "decode")):
            left = max(0.1, deadline - time.monotonic())
            stops = {m.actor.stop.remote(left): m for role in roles for m in self._of(role) if m.state is not None}
            if stops:
                _, late = ray.wait(list(stops), num_returns=len(stops), timeout=left)
                for stop in late:
                    self.report(f"{stops[stop].seat.name}: does not end in time; ended by force")
        for member in self.members:
            ray.kill(member.actor, no_restart=True)
        self.members.clear()

    def _await_ready(self, deadline: float, stopping: Stopping) -> None:
        members = self.members
        while not all(member.ready for member in members):
            if stopping():
                raise StartInterruptedError
            self._poll()
            for member in members:
                self._check_start(member)
            now = time.monotonic()
            if now > deadline:
                raise StartError(f"not ready in time (ray.start_timeout_s): {self._awaited()}")
            if now > self._last_news + SILENCE_S:
                self._tell(f"waiting for {self._awaited()}")

    def _awaited(self) -> str:
        """Who is not ready, and what the cluster lacks for those who have no process yet."""
        names = ", ".join(f"{m.seat.name} ({m.state or 'no process yet'})" for m in self.members if not m.ready)
        if all(member.state for member in self.members):
            return names
        return f"{names}; {_resources(self.seats)}"

    def _tell(self, line: str) -> None:
        self._last_news = time.monotonic()
        self.report(line)

    def _check_start(self, member: Member) -> None:
        if member.state is State.STOPPED:
            raise StartError(f"{member.seat.name} ended while starting")
        if member.deaths >= MAX_DEATHS_AT_START:
            raise StartError(f"{member.seat.name}: its process died {member.deaths} times while starting")

    def _poll(self) -> None:
        """Gathers the answers that come within a round, starts what is idle, passes on new addresses."""
        began = time.monotonic()
        for member in self.members:
            if member.pending is None:
                member.pending = member.actor.status.remote(member.next_line)
        ray.wait([member.pending for member in self.members], num_returns=len(self.members), timeout=ROUND_S)
        for member in self.members:
            self._take_answer(member)
        self._announce()
        time.sleep(max(0.0, ROUND_S - (time.monotonic() - began)))

    def _take_answer(self, member: Member) -> None:
        try:
            status: Status = ray.get(member.pending, timeout=0)
        except GetTimeoutError:
            return
        except RuntimeEnvSetupError as error:
            raise StartError(f"{member.seat.name}: Ray could not set up its environment: {error}") from error
        except RayActorError:
            member.pending = None
            self._lost(member)
            return
        member.pending = None
        for line in status.lines:
            self._tell(f"{member.seat.name}: {line.removeprefix(f'{member.seat.role}: ')}")
        member.next_line = status.next_line
        if status.state is State.IDLE and member.state not in (None, State.IDLE):
            self._lost(member)
        before, member.state = member.state, status.state
        if status.state is State.READY and before is not State.READY:
            member.address, member.http, member.failures = status.address, status.http, 0
            http = f", http://{status.http}" if status.http else ""
            self._tell(f"{member.seat.name}: ready at {status.address}{http}")
        elif status.state is State.FAILED and before is not State.FAILED:
            self._failed(member, status)
        elif status.state is State.IDLE and time.monotonic() >= member.not_before:
            self._serve(member)

    def _serve(self, member: Member) -> None:
        self._tell(f"{member.seat.name}: importing")
        config = member.seat.config
        if member.seat.role == "gateway":
            # Clients know a gateway by its addresses: one that comes back takes the ports that it had.
            for field, address in (("gateway.grpc_port", member.address), ("gateway.http_port", member.http)):
                config = config.override(**{field: int(address.rpartition(":")[2]) if address else None})
        member.actor.start.remote(config, member.seat.cores)
        if member.seat.role == "gateway":
            member.actor.update_workers.remote(*self._announced)
        member.state = State.LOADING

    def _lost(self, member: Member) -> None:
        """Its process has died; Ray is bringing up a new one, which will be idle."""
        if member.state not in (None, State.IDLE):
            self._tell(f"{member.seat.name}: its process died; Ray starts it again")
            member.deaths += 1
            self._delay(member)
        member.state, member.next_line = State.IDLE, 0

    def _failed(self, member: Member, status: Status) -> None:
        if not member.address:
            raise StartError(f"{member.seat.name}: {status.error}", user_error=status.user_error)
        self._tell(f"{member.seat.name}: failed: {status.error}")

    def _restart_process(self, member: Member) -> None:
        """A failed role gets a new process: its old one may hold memory, threads and sockets."""
        ray.kill(member.actor, no_restart=False)
        member.state, member.pending, member.next_line = State.IDLE, None, 0
        self._delay(member)

    def _delay(self, member: Member) -> None:
        first, longest = RESTART_DELAYS_S
        delay = 0.0 if member.failures == 0 else min(longest, first * 2 ** (member.failures - 1))
        member.failures += 1
        member.not_before = time.monotonic() + delay

    def _announce(self) -> None:
        """Tells the gateways where the workers are, when that has changed."""
        addresses = self._worker_addresses()
        if addresses == self._announced:
            return
        self._announced = addresses
        for gateway in self._of("gateway"):
            if gateway.state in (State.LOADING, State.READY):
                gateway.actor.update_workers.remote(*addresses)

    def _check_hosts(self) -> None:
        """A worker on the loopback interface cannot be reached from another node."""
        infos = ray.get([member.actor.info.remote() for member in self.members], timeout=INFO_TIMEOUT_S)
        if len({info.node_ip for info in infos}) == 1:
            return
        for member, info in zip(self.members, infos, strict=True):
            known = member.address.rpartition(":")[0] == info.node_ip  # what other nodes call this one by
            if member.seat.role != "gateway" and member.address.startswith(LOOPBACK_PREFIXES) and not known:
                raise StartError(
                    f"{member.seat.role}.host: {member.address} cannot be reached from the other nodes; use 0.0.0.0",
                    user_error=True,
                )

    def _worker_addresses(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        prefill, decode = (tuple(m.address for m in self._of(role) if m.address) for role in ("prefill", "decode"))
        return prefill, decode

    def _of(self, role: str) -> list[Member]:
        return [member for member in self.members if member.seat.role == role]


def _resources(seats: Sequence[Seat]) -> str:
    free, total = ray.available_resources(), ray.cluster_resources()
    claims = needed_resources(seats).items()
    have = ", ".join(
        f"{count:g} {kind} ({free.get(kind, 0):g} of {total.get(kind, 0):g} are free)" for kind, count in claims
    )
    return f"the system claims in all {have}"
