"""Starts the actors of a system, watches them, and ends them.

One thread, one loop: each round asks every actor for its status and does what the answers call for. An actor
that Ray has restarted answers that it is idle, and is told to serve again; when its address has changed, the
gateways hear of it. One that has answered and does so no longer is killed, so that Ray restarts it. What other threads
want done is put into `orders`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RuntimeEnvSetupError

from cluster import leaving
from cluster.actors import Answer
from cluster.hints import resources, unreachable
from cluster.member import Member
from cluster.news import Announcer
from cluster.orders import Orders
from cluster.placement import Plan
from cluster.rollout import Rollout
from cluster.roster import Roster
from cluster.shell import State, Status

#: Seconds that a round waits for answers; an actor may answer in a later round.
ROUND_S = 0.25
#: Processes of one actor that may die before it has ever been ready.
MAX_DEATHS_AT_START = 2
#: Seconds without news while starting after which it is told what is being waited for.
SILENCE_S = 5.0
#: Seconds after which a process that Ray has declared dead for good is replaced by a new actor.
GONE_S = 5.0
#: Seconds between two lines on an actor that waits for a process while the others serve.
WAITING_LINE_S = 30.0

Report = Callable[[str], None]
Stopping = Callable[[], bool]


class StartError(RuntimeError):
    """The system could not be started. `user_error`: a wrong configuration, model or port."""

    def __init__(self, message: str, *, user_error: bool = False) -> None:
        super().__init__(message)
        self.user_error = user_error


class StartInterruptedError(RuntimeError):
    """The start was given up because somebody asked to stop."""


class Supervisor:
    """Owns the actors of one system. Use from one thread, but for `orders`; `close` is safe at any point."""

    def __init__(self, plan: Plan, env: Mapping[str, str], report: Report) -> None:
        self.report = report
        self.roster = Roster(plan, env)
        self.orders = Orders()
        self.began = time.monotonic()
        self.started = False
        #: Seconds that requests have to end, once somebody has asked the system to stop.
        self.stop_grace_s: float | None = None
        #: The last one that was asked for.
        self.rollout: Rollout | None = None
        self._announcer = Announcer()
        self._last_news = time.monotonic()

    @property
    def members(self) -> list[Member]:
        return self.roster.members

    def start(self, timeout_s: float, stopping: Stopping = lambda: False) -> list[str]:
        """Starts all actors and returns the gateways' addresses once all are ready. Raises StartError."""
        deadline = time.monotonic() + timeout_s
        self.roster.fill()
        self._await_ready(deadline, stopping)
        for member in self.members:
            if problem := unreachable(member, self.members):
                raise StartError(problem, user_error=True)
        self.started = True
        return [gateway.address for gateway in self.roster.of("gateway")]

    @property
    def http(self) -> list[str]:
        """The addresses of the gateways' HTTP APIs, in the gateways' order; none where none is served."""
        return [gateway.http for gateway in self.roster.of("gateway") if gateway.http]

    @property
    def stopping(self) -> bool:
        return self.stop_grace_s is not None

    @property
    def phase(self) -> str:
        return "stopping" if self.stopping else "serving" if self.started else "starting"

    def ask_to_stop(self, grace_s: float) -> None:
        """Has `watch` return, and `start` give up."""
        self.stop_grace_s = grace_s

    def watch(self, stopping: Stopping) -> None:
        """Keeps the system going until told to stop."""
        while not stopping() and not self.stopping:
            self.round()

    def round(self) -> None:
        """One look at every actor; restarts what has failed or hangs, tells gateways about new addresses, goes on with
        those that leave and with a change of configuration, and carries out orders.
        """
        self.poll()
        for member in self.members:
            if member.state is State.FAILED and member.leaving is None:
                self._restart_process(member, member.error)
            self._tell_waiting(member)
        leaving.step(self.roster, self._announcer, self.tell)
        if self.rollout is not None:
            self.rollout.step(self.roster, self.tell)
        self.orders.carry_out()

    def close(self, grace_s: float) -> None:
        """Ends all actors, gateways first: politely within `grace_s` seconds in all, then by force."""
        self.orders.close()
        deadline = time.monotonic() + grace_s
        for roles in (("gateway",), ("prefill", "decode")):
            left = max(0.1, deadline - time.monotonic())
            stops = {m.actor.stop.remote(left): m for m in self.members if m.role in roles and m.info is not None}
            if stops:
                _, late = ray.wait(list(stops), num_returns=len(stops), timeout=left)
                for stop in late:
                    self.report(f"{stops[stop].name}: does not end in time; ended by force")
        self.roster.clear()

    def _await_ready(self, deadline: float, stopping: Stopping) -> None:
        while not all(member.ready for member in self.members):
            if stopping() or self.stopping:
                raise StartInterruptedError
            self.poll()
            self.orders.carry_out()
            for member in self.members:
                self._check_start(member)
            now = time.monotonic()
            if now > deadline:
                raise StartError(f"not ready in time (ray.start_timeout_s): {self._awaited()}")
            if now > self._last_news + SILENCE_S:
                self.tell(f"waiting for {self._awaited()}")

    def _awaited(self) -> str:
        """Who is not ready, and what the cluster lacks for those who have no process yet."""
        late = [member for member in self.members if not member.ready]
        names = ", ".join(f"{m.name} ({m.state if m.info and m.state else 'no process yet'})" for m in late)
        return names if all(member.info for member in late) else f"{names}; {resources(self.members)}"

    def tell(self, line: str) -> None:
        self._last_news = time.monotonic()
        self.report(line)

    def _check_start(self, member: Member) -> None:
        if member.state is State.STOPPED:
            raise StartError(f"{member.name} ended while starting")
        if member.deaths >= MAX_DEATHS_AT_START:
            raise StartError(f"{member.name}: its process died {member.deaths} times while starting")

    def poll(self) -> None:
        """Gathers the answers that come within a round, starts what is idle, passes on new addresses."""
        began = time.monotonic()
        for member in self.members:
            if member.pending is None:
                member.pending, member.asked_at = member.actor.status.remote(member.next_line), began
        pending = [member.pending for member in self.members]
        ray.wait(pending, num_returns=len(pending), timeout=ROUND_S)
        for member in self.members:
            self._take_answer(member)
            self._check_hung(member)
        self._announcer.announce(self.members)
        time.sleep(max(0.0, ROUND_S - (time.monotonic() - began)))

    def _take_answer(self, member: Member) -> None:
        try:
            answer: Answer = ray.get(member.pending, timeout=0)
        except GetTimeoutError:
            return
        except RuntimeEnvSetupError as error:
            member.pending = None
            if not self.started:
                raise StartError(f"{member.name}: Ray could not set up its environment: {error}") from error
            self._gone(member, f"Ray could not set up its environment: {error}")
            return
        except RayActorError as error:
            member.pending = None
            self._lost(member)
            if isinstance(error, ActorDiedError):
                self._gone(member, "Ray has given it up")
            return
        member.pending = member.gone_since = None
        self._take_status(member, answer)

    def _take_status(self, member: Member, answer: Answer) -> None:
        status = answer.status
        if status.state is State.IDLE and member.state not in (None, State.IDLE):
            self._lost(member)
        for line in status.lines:
            self.tell(f"{member.name}: {line.removeprefix(f'{member.role}: ')}")
        member.next_line, member.info = status.next_line, answer.info
        if status.load is not None:
            member.load = status.load
            member.rate.note(time.monotonic(), status.load.tokens)
        before, member.state = member.state, status.state
        if status.state is State.READY and before is not State.READY:
            member.address, member.http, member.failures, member.error = status.address, status.http, 0, ""
            http = f", http://{status.http}" if status.http else ""
            self.tell(f"{member.name}: ready at {status.address}{http}")
            if self.started and (problem := unreachable(member, self.members)):
                self.tell(problem)
        elif status.state is State.FAILED and before is not State.FAILED:
            self._failed(member, status)
        elif status.state is State.IDLE and time.monotonic() >= member.not_before and member.leaving is None:
            self._serve(member)

    def _serve(self, member: Member) -> None:
        self.tell(f"{member.name}: importing")
        config = self.roster.assign(member)
        if member.role == "gateway":
            # Clients know a gateway by its addresses: one that comes back takes the ports that it had.
            for field, address in (("gateway.grpc_port", member.address), ("gateway.http_port", member.http)):
                config = config.override(**{field: int(address.rpartition(":")[2]) if address else None})
        member.actor.start.remote(config, member.cores)
        member.state = State.LOADING
        if member.role == "gateway":
            self._announcer.tell(member)

    def _lost(self, member: Member) -> None:
        """Its process has died; Ray is bringing up a new one, which will be idle."""
        if member.info is not None:
            self.tell(f"{member.name}: its process died; Ray starts it again")
            member.note_death("its process died")

    def _gone(self, member: Member, reason: str) -> None:
        """Ray will not bring it back: another actor takes its place."""
        now = time.monotonic()
        member.error = reason
        member.gone_since = member.gone_since or now
        if now - member.gone_since > GONE_S and member.leaving is None:
            self.tell(f"{member.name}: {reason}; a new one takes its place")
            self.roster.renew(member)

    def _check_hung(self, member: Member) -> None:
        """Kills a process that has answered before and does so no longer; loading may take it as long as starting."""
        ray_config = self.roster.plan.config.ray
        patience_s = ray_config.hung_after_s
        if not member.ready:
            patience_s = max(patience_s, ray_config.start_timeout_s)
        if member.info is not None and member.silent_s(time.monotonic()) > patience_s:
            self.tell(f"{member.name}: no answer for {patience_s:g} s (ray.hung_after_s); its process is killed")
            self._restart_process(member, "it hung")

    def _tell_waiting(self, member: Member) -> None:
        """Says now and then what keeps one from coming back, or from coming."""
        now = time.monotonic()
        if member.info is None and member.leaving is None and now > member.told_waiting + WAITING_LINE_S:
            member.told_waiting = now
            self.tell(f"{member.name}: waits {member.detail(now)}; {resources(self.members)}")

    def _failed(self, member: Member, status: Status) -> None:
        if not self.started:
            raise StartError(f"{member.name}: {status.error}", user_error=status.user_error)
        member.error = status.error
        self.tell(f"{member.name}: failed: {status.error}")

    def _restart_process(self, member: Member, reason: str) -> None:
        """It gets a new process: the old one may hold memory, threads and sockets, or hang."""
        ray.kill(member.actor, no_restart=False)
        member.pending = None
        member.note_death(reason)
