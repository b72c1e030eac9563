"""A gateway servicer for the SDK's tests, behind a real server on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator

import grpc

from branchline.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from branchline.wire.server import RpcServer
from branchline.wire.status import RpcFailure

INFO = gateway_pb2.GetInfoResponse(
    version="1.2.3",
    model="tiny",
    max_model_len=512,
    tree="chain:3",
    active_requests=2,
    workers=[
        gateway_pb2.WorkerInfo(
            role="decode", address="127.0.0.1:7", healthy=True, blocks_total=9, blocks_used=4, requests=2, tasks=3
        )
    ],
)


class ScriptedGateway(gateway_pb2_grpc.GatewayServiceServicer):  # type: ignore[misc]
    """Echoes the prompt's characters as text and token ids; a prompt "!NAME" does what NAME says."""

    def __init__(self) -> None:
        self.requests: list[gateway_pb2.GenerateRequest] = []
        self.running = 0
        self.cancelled = threading.Semaphore(0)  # released once for every cancelled call

    async def Generate(  # noqa: N802
        self, request: gateway_pb2.GenerateRequest, _: grpc.aio.ServicerContext
    ) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        self.requests.append(request)
        self.running += 1
        try:
            if request.prompt.startswith("!CODE "):
                raise RpcFailure(grpc.StatusCode[request.prompt.removeprefix("!CODE ")], "as you wish")
            samples = range(request.n or 1)
            for position, character in enumerate(request.prompt.removeprefix("!")):
                for sample in samples:  # side by side
                    yield piece(request, sample, position, character)
            if request.prompt == "!wait":
                await asyncio.sleep(60)
            if request.prompt == "!stray sample":
                yield gateway_pb2.GenerateResponse(sample=1, text="?")
            # Held-back text may come with the last response; one without anything may come before.
            yield gateway_pb2.GenerateResponse()
            for sample in reversed(samples):  # whichever is ready first
                if request.prompt == "!unfinished" and sample == 0:
                    return
                yield gateway_pb2.GenerateResponse(sample=sample, text=".", finished=finished(request))
        except (asyncio.CancelledError, GeneratorExit):  # the latter when it comes during a yield
            self.cancelled.release()
            raise
        finally:
            self.running -= 1

    async def GetInfo(  # noqa: N802
        self, _request: gateway_pb2.GetInfoRequest, _: grpc.aio.ServicerContext
    ) -> gateway_pb2.GetInfoResponse:
        return INFO


def piece(
    request: gateway_pb2.GenerateRequest, sample: int, position: int, character: str
) -> gateway_pb2.GenerateResponse:
    """A character and its token; sample 1 has the next character of the alphabet, and so on."""
    token_id = ord(character) + sample
    response = gateway_pb2.GenerateResponse(sample=sample, text=chr(token_id), token_ids=[token_id])
    if request.HasField("logprobs"):
        top = range(request.logprobs)
        response.logprobs.add(
            logprob=-position - 0.5,
            top_token_ids=[token_id + rank for rank in top],
            top_logprobs=[-position - rank / 4 for rank in top],
        )
        if request.prompt == "!torn":
            response.logprobs[0].top_logprobs.append(0.0)
    return response


def finished(request: gateway_pb2.GenerateRequest) -> gateway_pb2.Completion:
    unknown = request.prompt == "!unknown reason"
    return gateway_pb2.Completion(
        finish_reason=types_pb2.FINISH_REASON_UNSPECIFIED if unknown else types_pb2.FINISH_REASON_STOP,
        usage=gateway_pb2.Usage(prompt_tokens=7, completion_tokens=len(request.prompt), cached_tokens=5),
        speculation=types_pb2.Speculation(target_forwards=4, drafted=20, accepted=6),
        seed=request.seed if request.HasField("seed") else 99,
        failovers=1,
        preemptions=2,
    )


class ServerThread:
    """The server's event loop, apart from the test's: the synchronous client blocks the thread it is called from."""

    def __init__(self) -> None:
        self.gateway = ScriptedGateway()
        self.loop = asyncio.new_event_loop()
        self.server = RpcServer("127.0.0.1", 0)
        self.server.add(
            "branchline.v1.GatewayService", self.gateway, gateway_pb2_grpc.add_GatewayServiceServicer_to_server
        )
        self.target = ""

    def set_serving(self, serving: bool) -> None:
        asyncio.run_coroutine_threadsafe(self.server.set_serving(serving), self.loop).result(10)

    @contextlib.contextmanager
    def running(self) -> Iterator[ServerThread]:
        thread = threading.Thread(target=self.loop.run_forever)
        thread.start()
        try:
            self.target = asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result(10)
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self.server.stop(grace_s=0), self.loop).result(10)
            self.loop.call_soon_threadsafe(self.loop.stop)
            thread.join(10)
            self.loop.close()
