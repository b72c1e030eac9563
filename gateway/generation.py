"""Generating for a call that was let in: the one way from a front end's request to the workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc

from branchline.v1 import gateway_pb2
from branchline.wire.status import RpcFailure
from gateway.backend import Backend
from gateway.conversation import Conversation
from gateway.door import Door, Guest, Visit
from gateway.journal import JournalEntry
from gateway.limits import Limits
from gateway.output import Output
from gateway.relay import Relay
from gateway.sample import Sample
from gateway.tokens import Tokens
from gateway.validate import resolve
from gateway.watch import RequestWatch, Watch

#: How long before its own deadline a client is answered, at most: it should hear why, not just that its time is up.
_ANSWER_S = 0.1

#: Takes a response, and the number of the prompt that it belongs to. Calls come one after the other.
Write = Callable[[int, gateway_pb2.GenerateResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt and what is wanted of it. A `chat` is the input in place of the request's own."""

    request: gateway_pb2.GenerateRequest
    chat: Conversation | None = None
    #: Show special tokens by their names, except those that end the text.
    special_tokens: bool = False


class Generator:
    """Belongs to one event loop."""

    def __init__(self, backend: Backend, tokens: Tokens, door: Door, watch: Watch) -> None:
        self.backend = backend
        self._watch = watch
        self.tokens = tokens
        self.door = door

    @property
    def limits(self) -> Limits:
        """Raises RpcFailure before any worker is known."""
        max_model_len = self.backend.pool.max_model_len
        if max_model_len is None:
            raise RpcFailure(grpc.StatusCode.UNAVAILABLE, "no worker has been seen yet", retry_after_s=1.0)
        return Limits(max_model_len=max_model_len, max_tokens=self.backend.config.max_tokens_limit)

    @contextlib.asynccontextmanager
    async def open(self, guest: Guest, prompts: int = 1) -> AsyncIterator[Session]:
        """A call is admitted, and its deadline runs until the block ends.

        Raises RpcFailure: RESOURCE_EXHAUSTED, UNAVAILABLE, DEADLINE_EXCEEDED, or CANCELLED when somebody aborted it.
        """
        with self._watch.request(guest.call) as watch, self.door.admit(guest, prompts) as visit:
            watch.admitted(visit, next((w.status.model for w in self.backend.pool.workers if w.status), ""))
            left = guest.call.timeout_s
            timeout_s = self.backend.config.request_timeout_s if left is None else left - min(_ANSWER_S, left / 10)
            session = Session(self, visit, watch, visit.arrived + timeout_s)
            try:
                async with visit.deadline(timeout_s):
                    yield session
            except TimeoutError:
                raise session.timed_out() from None


class Session:
    """One call, from its prompts to their last responses."""

    def __init__(self, generator: Generator, visit: Visit, watch: RequestWatch, until: float) -> None:
        """`until`: the deadline on the monotonic clock."""
        self.request_id = visit.request_id
        self._generator = generator
        self._visit = visit
        self._watch = watch
        self._until = until
        self._asks: Sequence[Ask] = ()
        self._prompts: list[tuple[JournalEntry, ...]] = []
        self._relays: list[Relay] = []

    async def read(self, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
        """Checks all requests; the token ids of their prompts. Raises InvalidRequestError, naming the field."""
        assert len(asks) == self._visit.requests
        assert not self._prompts
        for number, ask in enumerate(asks):
            entries = await resolve(
                ask.request,
                self._generator.tokens,
                self._generator.limits,
                self._visit.arrived,
                request_id=self.request_id if len(asks) == 1 else f"{self.request_id}_{number}",
                chat=ask.chat,
            )
            self._prompts.append(entries)
        self._asks = asks
        self._visit.entries = [entry for entries in self._prompts for entry in entries]
        self._watch.read(self._visit.entries)
        return [entries[0].prompt for entries in self._prompts]

    async def run(self, write: Write, replayed: Callable[[gateway_pb2.GenerateResponse], None] | None = None) -> None:
        """Writes all responses. `replayed` gets those that the client of a resumed stream has, in place of all of them
        one for each sample.

        Raises RpcFailure or InvalidRequestError when a prompt's request can't succeed.
        """
        assert self._prompts
        sending = asyncio.Lock()  # front ends take one message at a time
        samples = [self._samples(number, sending, write) for number in range(len(self._prompts))]
        for sample in (sample for each in samples for sample in each if sample.entry.emitted):
            replay = sample.replay()
            if replayed is not None:
                replayed(replay)
        self._relays = [Relay(self._generator.backend, each, self._until) for each in samples]
        if len(self._relays) == 1:
            await self._relays[0].run()
            return
        try:
            async with asyncio.TaskGroup() as group:
                for relay in self._relays:
                    group.create_task(relay.run(), name=f"relay {self.request_id}")
        except ExceptionGroup as errors:  # the first prompt that failed for good; the others were cancelled then
            raise errors.exceptions[0] from None

    def timed_out(self) -> RpcFailure:
        """What the end of the call's time means."""
        if self._visit.aborted is not None:
            return self._visit.aborted
        if not self._relays:
            return RpcFailure(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request was read")
        return self._relays[0].timed_out()

    def _samples(self, number: int, sending: asyncio.Lock, write: Write) -> list[Sample]:
        async def send(response: gateway_pb2.GenerateResponse) -> None:
            async with sending:
                await write(number, response)

        tokens, special = self._generator.tokens, self._asks[number].special_tokens
        return [
            Sample(
                index,
                entry,
                Output(tokens.detokenizer(special_tokens=special), entry.stop),
                send,
                self._watch.sample(entry),
            )
            for index, entry in enumerate(self._prompts[number])
            if not entry.settled
        ]
