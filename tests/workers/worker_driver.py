"""Starts workers and plays the gateway to them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from transformers import PreTrainedModel

import decode_worker.serve
import prefill_worker.serve
from branchline.config import Config, from_mapping
from branchline.core import Request
from branchline.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from branchline.wire.channels import open_channel
from branchline.wire.convert import request_to_proto

TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Tiny:
    directory: Path
    oracle: PreTrainedModel
    model: Path
    head: Path
    other_head: Path

    def config(self, **flags: Any) -> Config:
        return from_mapping(
            {
                "model": {
                    "model": str(self.model),
                    "draft": str(self.head),
                    "dtype": "float32",
                    "provider": "reference",
                    "device": "cpu",
                    "tree": "default",
                },
                # Adaptive trees would make what is drafted depend on the clock.
                "engine": {
                    "kv_cache_mib": 8,
                    "max_batch": 4,
                    "prefill_chunk_tokens": 16,
                    "threads": 1,
                    "adaptive_tree": False,
                },
                "decode": {"lease_ttl_s": 2.0},
                "prefill": {"lease_ttl_s": 2.0},
            }
        ).override(**flags)

    @torch.inference_mode()
    def greedy(self, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Plain greedy decoding by Hugging Face's model, without a cache."""
        tokens = list(prompt)
        for _ in range(count):
            logits = self.oracle(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
        return tuple(tokens[len(prompt) :])

    @torch.inference_mode()
    def logprobs(self, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
        """The oracle's log-probabilities where each token of `output` was chosen: `[len(output), vocab]`."""
        logits = self.oracle(torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :]
        return logits.log_softmax(-1)


@dataclass
class Outcome:
    """What came out of one request."""

    token_ids: list[int] = field(default_factory=list)
    finish: types_pb2.FinishReason = types_pb2.FINISH_REASON_UNSPECIFIED
    speculation: types_pb2.Speculation = field(default_factory=types_pb2.Speculation)
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    preempted: bool = False


def sample_of(request: Request, number: int) -> Request:
    """A sample's own request, as the gateway attaches with it."""
    index = request.sampling.sample_index + number
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, sample_index=index))


@dataclass
class Driver:
    """Stubs of one prefill and one decode worker."""

    prefill: Any
    decode: Any
    prefill_address: str
    decode_address: str
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    def request(self, prompt: tuple[int, ...], max_tokens: int, **options: Any) -> Request:
        return Request(f"request-{next(self.numbers)}", prompt, max_tokens, **options)

    async def status(self) -> tuple[prefill_pb2.PrefillServiceGetStatusResponse, Any]:
        return (
            await self.prefill.GetStatus(prefill_pb2.PrefillServiceGetStatusRequest(), timeout=TIMEOUT_S),
            await self.decode.GetStatus(decode_pb2.DecodeServiceGetStatusRequest(), timeout=TIMEOUT_S),
        )

    async def reserve(self, request: Request, **changes: Any) -> decode_pb2.ReserveResponse:
        """Without the context's token ids, unless `changes` bring them: hand-made frames take nothing's place."""
        prefill, _ = await self.status()
        message = decode_pb2.ReserveRequest(
            request_id=request.request_id,
            context_length=len(request.context),
            max_length=request.max_length,
            fingerprint=prefill.fingerprint,
            attempt=1,
        )
        message.MergeFrom(decode_pb2.ReserveRequest(**changes))
        return await self.decode.Reserve(message, timeout=TIMEOUT_S)

    async def attach(self, lease_id: str, request: Request) -> Any:
        """The open stream, behind its first message."""
        call = self.decode.Attach(
            decode_pb2.AttachRequest(lease_id=lease_id, request=request_to_proto(request)), timeout=TIMEOUT_S
        )
        first = await call.read()
        assert first.WhichOneof("event") == "attached"
        return call

    def start_prefill(self, request: Request, lease: decode_pb2.ReserveResponse) -> Any:
        return self.prefill.Prefill(
            prefill_pb2.PrefillRequest(
                request=request_to_proto(request),
                decode_address=self.decode_address,
                lease_id=lease.lease_id,
                ship_draft=lease.accepts_draft,
                samples=1 + len(lease.sibling_lease_ids),
                held_tokens=lease.held_tokens,
            ),
            timeout=TIMEOUT_S,
        )

    async def complete(self, request: Request) -> Outcome:
        """The whole way of one request, as the gateway goes it: cancelled anywhere, it gives its lease back."""
        [outcome] = await self.complete_samples(request, 1)
        return outcome

    async def complete_samples(self, request: Request, samples: int, **changes: Any) -> list[Outcome]:
        """The same for several samples that share the prompt."""
        reserving = asyncio.ensure_future(
            self.reserve(request, samples=samples, **{"context": request.context} | changes)
        )
        try:
            lease = await asyncio.shield(reserving)
            return await self._complete(request, lease)
        finally:
            lease = await reserving
            await self.abort(lease)

    async def _complete(self, request: Request, lease: decode_pb2.ReserveResponse) -> list[Outcome]:
        lease_ids = [lease.lease_id, *lease.sibling_lease_ids]
        requests = [sample_of(request, number) for number in range(len(lease_ids))]
        streams = [await self.attach(*one) for one in zip(lease_ids, requests, strict=True)]
        outcomes = [Outcome() for _ in requests]
        try:
            async for event in self.start_prefill(request, lease):
                if event.WhichOneof("event") == "first_token":
                    outcome = outcomes[event.first_token.sample]
                    outcome.token_ids.append(event.first_token.token_id)
                    outcome.finish = event.first_token.finish_reason
                    if event.first_token.HasField("logprobs"):
                        outcome.logprobs.append(event.first_token.logprobs)
            if not all(outcome.finish for outcome in outcomes):
                await asyncio.gather(*map(self.relay, streams, requests, outcomes))
        finally:
            for stream in streams:
                stream.cancel()
        return outcomes

    async def abort(self, lease: decode_pb2.ReserveResponse) -> None:
        for lease_id in (lease.lease_id, *lease.sibling_lease_ids):
            await self.decode.Abort(decode_pb2.AbortRequest(lease_id=lease_id), timeout=TIMEOUT_S)

    async def relay(self, stream: Any, request: Request, outcome: Outcome) -> None:
        while (event := await stream.read()) is not grpc.aio.EOF:
            if event.WhichOneof("event") == "finished":
                outcome.finish = event.finished.reason
                continue
            if event.WhichOneof("event") == "preempted":
                outcome.preempted = True
                continue
            outcome.speculation = event.tokens.speculation
            at = event.tokens.index - len(request.emitted)
            tokens, logprobs = list(event.tokens.token_ids), list(event.tokens.logprobs)
            assert len(logprobs) == (0 if request.logprobs is None else len(tokens))
            if at == 0:
                assert outcome.token_ids == tokens, "decode repeats prefill's token"
                assert outcome.logprobs == logprobs, "decode repeats prefill's log-probabilities"
            else:
                assert at == len(outcome.token_ids), "a token was lost or came twice"
                outcome.token_ids += tokens
                outcome.logprobs += logprobs

    async def prefill_idle(self) -> bool:
        status = await self.prefill.GetStatus(prefill_pb2.PrefillServiceGetStatusRequest(), timeout=TIMEOUT_S)
        return status.blocks_used == status.queued == status.tasks == 0

    async def decode_idle(self) -> bool:
        status = await self.decode.GetStatus(decode_pb2.DecodeServiceGetStatusRequest(), timeout=TIMEOUT_S)
        return status.blocks_used == status.leases == status.running == status.tasks == status.queued == 0

    async def wait_until_idle(self, timeout_s: float = 1.0) -> None:
        """Nothing is in use on either side within `timeout_s`."""

        async def idle() -> bool:
            return await self.prefill_idle() and await self.decode_idle()

        await eventually(idle, timeout_s, lambda: "blocks, leases or tasks are still in use")


async def eventually(condition: Callable[[], Any], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline, what()
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(serve: Any, config: Config) -> AsyncIterator[str]:
    """A worker's `serve` as a task; yields its address and ends it properly."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(config, ready=ready.set_result, stop=stop))
    try:
        await asyncio.wait({task, ready}, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        yield await ready
    finally:
        stop.set()
        await asyncio.wait_for(task, TIMEOUT_S)


@contextlib.asynccontextmanager
async def connected(prefill_address: str, decode_address: str) -> AsyncIterator[Driver]:
    async with open_channel(prefill_address) as prefill_channel, open_channel(decode_address) as decode_channel:
        yield Driver(
            prefill_pb2_grpc.PrefillServiceStub(prefill_channel),
            decode_pb2_grpc.DecodeServiceStub(decode_channel),
            prefill_address,
            decode_address,
        )


@contextlib.asynccontextmanager
async def running_workers(prefill: Config, decode: Config | None = None) -> AsyncIterator[Driver]:
    async with (
        running(prefill_worker.serve.serve, prefill) as prefill_address,
        running(decode_worker.serve.serve, decode or prefill) as decode_address,
        connected(prefill_address, decode_address) as driver,
    ):
        yield driver


async def drain(call: Any) -> None:
    """Reads to the end. Raises AioRpcError when that isn't OK."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def code_of(call: Any) -> grpc.StatusCode:
    """The status of a call that is expected to fail."""
    try:
        result = await call if not hasattr(call, "__aiter__") else [item async for item in call]
    except grpc.aio.AioRpcError as error:
        return error.code()
    raise AssertionError(f"did not fail: {result}")
