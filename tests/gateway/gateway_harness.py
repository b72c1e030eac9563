"""A gateway with scripted workers around it, and its innards in reach."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripted_workers import ScriptedDecode, ScriptedPrefill, eventually, expected_tokens, running

from branchline.config import GatewayConfig
from branchline.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from branchline.wire.channels import open_channel
from branchline.wire.server import RpcServer
from gateway.backend import Backend
from gateway.desk import Desk
from gateway.keys import Keyring
from gateway.parsing import Parsers
from gateway.service import GatewayService
from gateway.tokens import Tokens

PROMPT = (41, 42, 43)


@dataclass
class Answer:
    """One sample's."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    finished: gateway_pb2.Completion | None = None

    def add(self, response: gateway_pb2.GenerateResponse) -> None:
        assert self.finished is None, "a response after the last"
        self.text += response.text
        self.token_ids += response.token_ids
        self.logprobs += response.logprobs
        if response.HasField("finished"):
            self.finished = response.finished


@dataclass
class House:
    """`servers` and `addresses` are the workers', in the order given: prefill first."""

    prefills: Sequence[ScriptedPrefill]
    decodes: Sequence[ScriptedDecode]
    backend: Backend
    desk: Desk
    tokens: Tokens
    stub: Any
    servers: list[RpcServer]
    addresses: list[str]
    #: The gateway's HOST:PORT.
    target: str

    def call(self, max_tokens: int = 8, timeout: float | None = 20, **options: Any) -> Any:
        if not options.keys() & {"prompt", "token_ids"}:
            options["token_ids"] = gateway_pb2.TokenIds(ids=PROMPT)
        return self.stub.Generate(gateway_pb2.GenerateRequest(max_tokens=max_tokens, **options), timeout=timeout)

    async def answer(self, max_tokens: int = 8, **options: Any) -> Answer:
        (answer,) = await self.answers(max_tokens, **options)
        return answer

    async def answers(self, max_tokens: int = 8, **options: Any) -> list[Answer]:
        """One for each sample."""
        answers = [Answer() for _ in range(options.get("n", 1))]
        async for response in self.call(max_tokens, **options):
            answers[response.sample].add(response)
        assert all(answer.finished for answer in answers)
        return answers

    async def complete_all(self, n: int, max_tokens: int = 8, **options: Any) -> list[Answer]:
        """Samples that must all be whole."""
        answers = await self.answers(max_tokens, n=n, **options)
        for sample, answer in enumerate(answers):
            assert answer.token_ids == expected_tokens(PROMPT, max_tokens, sample)
            assert answer.text == self.tokens.decode(answer.token_ids)
            assert answer.finished.usage.completion_tokens == max_tokens
        return answers

    async def complete(self, max_tokens: int = 8, **options: Any) -> Answer:
        """An answer that must be whole: no token lost, none twice."""
        (answer,) = await self.complete_all(1, max_tokens, **options)
        return answer

    async def idle(self, within_s: float = 1.0) -> None:
        """Everything that served a request has ended, here and at the workers."""
        await eventually(self._idle, within_s)

    def _idle(self) -> bool:
        return not (
            self.desk.door.active_requests
            or self.backend.pool.in_flight
            or self.backend.leases.pending
            or any(prefill.running for prefill in self.prefills)
            or any(decode.leases for decode in self.decodes)
            or [t for t in asyncio.all_tasks() if t.get_name().startswith(("Attach", "Prefill", "abort"))]
        )


@contextlib.asynccontextmanager
async def house(
    tokens: Tokens,
    prefills: Sequence[ScriptedPrefill],
    decodes: Sequence[ScriptedDecode],
    parsers: Parsers | None = None,
    keyring: Keyring | None = None,
    **settings: Any,
) -> AsyncIterator[House]:
    config = GatewayConfig(**{"stall_timeout_s": 5.0, "worker_wait_s": 5.0, **settings})
    async with contextlib.AsyncExitStack() as stack:
        started = [await stack.enter_async_context(running(worker)) for worker in [*prefills, *decodes]]
        addresses = [address for _, address in started]
        backend = Backend(config)
        stack.push_async_callback(backend.close)
        backend.pool.update(addresses[: len(prefills)], addresses[len(prefills) :])
        await eventually(lambda: sum(worker.healthy for worker in backend.pool.workers) == len(addresses))
        desk = Desk.make(config, keyring)
        desk.add("tiny", backend, tokens, parsers)
        server = RpcServer("127.0.0.1", 0)
        GatewayService(desk).add_to(server)
        target = await server.start()
        channel = await stack.enter_async_context(open_channel(target))
        stack.push_async_callback(server.stop, 0)
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        yield House(prefills, decodes, backend, desk, tokens, stub, [s for s, _ in started], addresses, target)
