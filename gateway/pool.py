"""The pool of workers: who is there, who is well, who fits whom."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc

from branchline.core import InvalidRequestError
from branchline.wire.status import RpcFailure
from gateway.background import Background
from gateway.worker import Role, Worker

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
POLL_TIMEOUT_S = 2.0
#: Seconds that others are preferred to a worker that failed.
AVOID_S = 10.0
Connect = Callable[[Role, str], Worker]

#: Polls that may time out before a worker counts as gone: one that computes hard may answer late.
_LATE_POLLS = 2


class WorkersNotReadyError(RuntimeError):
    """No prefill and decode worker that fit together answered in time; the message says what is lacking."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prefill and a decode worker for one attempt."""

    prefill: Worker
    decode: Worker

    @property
    def identity(self) -> tuple[str, ...]:
        """Changes when one of the two restarts."""
        workers = (self.prefill, self.decode)
        return tuple(part for w in workers for part in (w.address, w.status.incarnation if w.status else ""))


@dataclass(frozen=True, slots=True)
class Pairs:
    """`fitting`: pairs that can share KV, in no order. `misfit`: why another pair can't, "" when there is none."""

    fitting: tuple[Pair, ...]
    misfit: str


@dataclass(frozen=True, slots=True)
class _Watch:
    """The task that polls a worker, and the event that makes it poll at once."""

    task: asyncio.Task[None]
    poke: asyncio.Event


class WorkerPool:
    """Polls every worker once a second. Belongs to one event loop; `update` alone may be called from any thread."""

    def __init__(self, connect: Connect = Worker) -> None:
        """`connect` makes a worker of a role and an address."""
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._workers: dict[tuple[Role, str], Worker] = {}
        self._watches: dict[Worker, _Watch] = {}
        self._background = Background()
        self._changed = asyncio.Event()
        self._closed = False
        #: Since when there has been no healthy prefill or no healthy decode worker; None while there are both.
        self.lacking_since: float | None = time.monotonic()

    def update(self, prefill: Sequence[str], decode: Sequence[str], draining: Sequence[str] = ()) -> None:
        """Replaces the addresses. Workers at addresses that stay keep their requests; those of others fail over. Of
        these, workers at addresses that are `draining` are chosen for no new request.

        Thread-safe; takes effect soon. Raises InvalidRequestError for an address that is not HOST:PORT.
        """
        wanted = [(Role.PREFILL, address) for address in prefill] + [(Role.DECODE, address) for address in decode]
        for _, address in wanted:
            _check_address(address)
        if not self._closed:
            self._loop.call_soon_threadsafe(self._replace, wanted, frozenset(draining))

    async def close(self) -> None:
        """Stops polling and closes all channels."""
        self._closed = True
        self._replace([])
        await self._background.drain(POLL_TIMEOUT_S)
        await self._background.close()

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    @property
    def tasks(self) -> int:
        """Tasks that the pool owns: one for each worker."""
        return len(self._background)

    @property
    def in_flight(self) -> int:
        """Requests in this gateway that use a worker now, counted once for each worker."""
        return sum(worker.in_flight for worker in self.workers)

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence that every known worker serves; None before any has answered."""
        lengths = [worker.status.max_model_len for worker in self.workers if worker.status]
        return min(lengths, default=None)

    @property
    def max_batch(self) -> int:
        """Requests that every known decode worker can run together; 1 before any has answered."""
        sizes = [worker.status.max_batch for worker in self.workers if worker.role is Role.DECODE and worker.status]
        return max(1, min(sizes, default=1))

    def pairs(self) -> Pairs:
        """All pairs of healthy workers with equal fingerprints, those that drain left out."""
        fitting, misfit = [], ""
        for prefill in self._healthy(Role.PREFILL):
            for decode in self._healthy(Role.DECODE):
                assert prefill.status
                assert decode.status
                difference = prefill.status.fingerprint.difference(decode.status.fingerprint)
                if difference is None:
                    fitting.append(Pair(prefill, decode))
                else:
                    misfit = f"{prefill} and {decode} differ in {difference}"
        return Pairs(tuple(fitting), misfit)

    def suspect(self, *workers: Worker) -> None:
        """A request failed there: ask at once how they are, choose them only when they are well, and others first."""
        for worker in workers:
            worker.healthy = False
            worker.avoid(AVOID_S)
            if watch := self._watches.get(worker):
                watch.poke.set()
        self._note_health()

    @contextlib.contextmanager
    def using(self, pair: Pair, samples: int = 1) -> Iterator[None]:
        """Counts a request on both workers: one prompt here, a lease for each sample there."""
        pair.prefill.in_flight += 1
        pair.decode.in_flight += samples
        try:
            yield
        finally:
            pair.prefill.in_flight -= 1
            pair.decode.in_flight -= samples

    def note_room(self) -> None:
        """A lease has ended: a request that waits for room may try again."""
        self._signal()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a worker's health changed, a lease ended, or `timeout_s` passed."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), timeout_s)

    def _healthy(self, role: Role) -> list[Worker]:
        return [w for w in self.workers if w.role is role and w.healthy and not w.draining]

    def _replace(self, wanted: list[tuple[Role, str]], draining: frozenset[str] = frozenset()) -> None:
        if self._closed:
            wanted = []
        for key in [key for key in self._workers if key not in wanted]:
            worker = self._workers.pop(key)
            worker.healthy = False
            self._watches.pop(worker).task.cancel()
        for role, address in wanted:
            if (role, address) not in self._workers:
                worker = self._connect(role, address)
                self._workers[role, address] = worker
                poke = asyncio.Event()
                task = self._background.spawn(self._watch(worker, poke), f"watch {worker}")
                self._watches[worker] = _Watch(task, poke)
            self._workers[role, address].draining = address in draining
        self._note_health()

    async def _watch(self, worker: Worker, poke: asyncio.Event) -> None:
        late = 0
        try:
            while True:
                poke.clear()
                late = await self._poll(worker, late)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(poke.wait(), POLL_INTERVAL_S)
        finally:
            await worker.close()

    async def _poll(self, worker: Worker, late: int) -> int:
        """Returns how many polls in a row have timed out."""
        was_healthy = worker.healthy
        try:
            worker.update(await worker.fetch_status(POLL_TIMEOUT_S))
            late = 0
        except InvalidRequestError as error:
            worker.healthy = False
            logger.warning("%s: its status makes no sense: %s", worker, error)
        except RpcFailure as error:
            late = late + 1 if error.code is grpc.StatusCode.DEADLINE_EXCEEDED else _LATE_POLLS
            worker.healthy = worker.healthy and late < _LATE_POLLS
            if was_healthy and not worker.healthy:
                logger.warning("%s does not answer: %s", worker, error)
        if worker.healthy != was_healthy:
            self._note_health()
        return late

    def _note_health(self) -> None:
        lacking = not (self._healthy(Role.PREFILL) and self._healthy(Role.DECODE))
        if not lacking:
            self.lacking_since = None
        elif self.lacking_since is None:
            self.lacking_since = time.monotonic()
        self._signal()

    def _signal(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidRequestError(f"a worker's address must be HOST:PORT, got {address!r}")
