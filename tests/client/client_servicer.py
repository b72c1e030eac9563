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
        self.chats: list[gateway_pb2.ChatRequest] = []
        self.others: list[str] = []  # the names of the other RPCs that were called
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
        self.others.append("GetInfo")
        return INFO

    async def Chat(  # noqa: N802
        self, request: gateway_pb2.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[gateway_pb2.ChatResponse]:
        """Thinks, echoes the last message and calls every tool twice over, piece by piece."""
        self.chats.append(request)
        await context.send_initial_metadata((("x-request-id", "abc"),))
        text = request.messages[-1].content
        for sample in range(request.options.n or 1):
            for character in text:
                part = gateway_pb2.GenerateResponse(sample=sample, text=character, token_ids=[ord(character)])
                yield gateway_pb2.ChatResponse(part=part)
            empty = gateway_pb2.GenerateResponse(sample=sample)
            for piece in ("hm", "m"):
                yield gateway_pb2.ChatResponse(part=empty, reasoning=piece)
            for index, tool in enumerate(request.tools):
                call = gateway_pb2.ToolCallPart(index=index, id=f"c{index}", name=tool.name)
                yield gateway_pb2.ChatResponse(part=empty, tool_calls=[call])
                for arguments in ('{"x":', " 1}"):
                    call = gateway_pb2.ToolCallPart(index=index, arguments=arguments)
                    yield gateway_pb2.ChatResponse(part=empty, tool_calls=[call])
            yield gateway_pb2.ChatResponse(part=empty)
            echo = gateway_pb2.GenerateRequest(prompt=text)
            last = gateway_pb2.GenerateResponse(sample=sample, finished=finished(echo))
            yield gateway_pb2.ChatResponse(part=last)

    async def Tokenize(  # noqa: N802
        self, request: gateway_pb2.TokenizeRequest, _: grpc.aio.ServicerContext
    ) -> gateway_pb2.TokenizeResponse:
        self.others.append("Tokenize")
        text = request.prompt or request.chat.messages[0].content
        return gateway_pb2.TokenizeResponse(token_ids=map(ord, text), max_model_len=512)

    async def Detokenize(  # noqa: N802
        self, request: gateway_pb2.DetokenizeRequest, _: grpc.aio.ServicerContext
    ) -> gateway_pb2.DetokenizeResponse:
        self.others.append("Detokenize")
        return gateway_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)) + "!" * request.special_tokens)

    async def ListModels(  # noqa: N802
        self, _request: gateway_pb2.ListModelsRequest, _: grpc.aio.ServicerContext
    ) -> gateway_pb2.ListModelsResponse:
        self.others.append("ListModels")
        return gateway_pb2.ListModelsResponse(
            models=[gateway_pb2.ModelInfo(id="tiny", max_model_len=512, aliases=["default"])]
        )

    async def GetStatus(  # noqa: N802
        self, _request: gateway_pb2.GetStatusRequest, _: grpc.aio.ServicerContext
    ) -> gateway_pb2.GetStatusResponse:
        self.others.append("GetStatus")
        running = gateway_pb2.RequestStatus(
            request_id="r",
            interface="http",
            age_s=1.5,
            prompt_tokens=3,
            completion_tokens=4,
            samples=2,
            priority=-7,
        )
        return gateway_pb2.GetStatusResponse(requests=[running], max_requests=256)

    async def Abort(  # noqa: N802
        self, request: gateway_pb2.GatewayServiceAbortRequest, _: grpc.aio.ServicerContext
    ) -> gateway_pb2.GatewayServiceAbortResponse:
        self.others.append("Abort")
        if request.request_id != "r":
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, f"no request {request.request_id}, {request.reason}")
        return gateway_pb2.GatewayServiceAbortResponse()


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

    def __init__(self, gateway: ScriptedGateway | None = None) -> None:
        self.gateway = gateway or ScriptedGateway()
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
