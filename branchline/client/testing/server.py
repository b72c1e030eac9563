"""The fake server: what a gateway answers to each RPC, out of a script."""

# ruff: noqa: N802 - the methods are named by gRPC

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc

from branchline.client import transport
from branchline.client.errors import RETRY_METADATA
from branchline.client.testing.script import Answer, Break, Fault, Pause, Raw, Request, Script, answer_to, play
from branchline.v1 import gateway_pb2, gateway_pb2_grpc

MODEL = "fake"
MAX_MODEL_LEN = 4096
#: Calls at once; each takes a thread while it lasts.
_THREADS = 64
_NOT_SERVING = b"\x08\x02"


def echo(request: Request) -> Answer:
    """The script of a server that was given none."""
    return request.prompt


@dataclass(slots=True, eq=False)
class _Running:
    request: Request
    began: float = field(default_factory=time.monotonic)
    #: The call is over, whoever ended it, or is to be.
    over: threading.Event = field(default_factory=threading.Event)
    aborted: str | None = None
    tokens: int = 0


class FakeServer(gateway_pb2_grpc.GatewayServiceServicer):
    """A gateway without workers, on a port of the loopback interface, with threads of its own:

        with FakeServer("Hello!") as server, Client(server.target) as client:
            assert client.complete(prompt="Hi").text == "Hello!"

    `script` says what is answered (see `Script`); without one each prompt comes back. It may be changed at any time.
    With an `api_key` calls need it. `port` 0 takes a free one; a given one is for a server that comes back.
    """

    def __init__(self, script: Script = echo, *, api_key: str | None = None, port: int = 0) -> None:
        self.script = script
        #: What came, in order, of all RPCs but health checks.
        self.requests: list[Request] = []
        #: What meets the next calls that generate, one each; None lets one pass.
        self.faults: list[Fault | Break | None] = []
        #: What health checks say.
        self.serving = True
        self._api_key = api_key
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fake server")
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 8 * 1024 * 1024)]
        self._server = grpc.server(self._pool, options=options)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self, self._server)
        health = grpc.unary_unary_rpc_method_handler(self._check_health)
        service, method = transport.HEALTH_METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: health}),))
        #: HOST:PORT, for clients.
        self.target = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whoever is still being answered loses the connection."""
        self._server.stop(None).wait(5)
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def running(self) -> int:
        """Calls that generate now."""
        return len(self._snapshot())

    def wait_idle(self, timeout: float = 5.0) -> None:
        """Returns when no call generates any more. Raises TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.running:
            if time.monotonic() >= end:
                raise TimeoutError(f"{self.running} calls are still running after {timeout:g} s")
            time.sleep(0.01)

    def Generate(
        self, message: gateway_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.GenerateResponse]:
        return self._generate("Generate", message, context, lambda response: response.part)

    def Chat(
        self, message: gateway_pb2.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.ChatResponse]:
        return self._generate("Chat", message, context, lambda response: response)

    def Tokenize(
        self, message: gateway_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.TokenizeResponse:
        self._note("Tokenize", message, context)
        texts = [each.content for each in message.chat.messages] or [message.prompt]
        return gateway_pb2.TokenizeResponse(token_ids=map(ord, "".join(texts)), max_model_len=MAX_MODEL_LEN)

    def Detokenize(
        self, message: gateway_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.DetokenizeResponse:
        self._note("Detokenize", message, context)
        return gateway_pb2.DetokenizeResponse(text="".join(map(chr, message.token_ids)))

    def GetInfo(
        self, message: gateway_pb2.GetInfoRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GetInfoResponse:
        self._note("GetInfo", message, context)
        load: dict[str, Any] = {"blocks_total": 9, "blocks_used": 4, "requests": 2, "tasks": 3, "model": MODEL}
        workers = [
            gateway_pb2.WorkerInfo(role=role, address="fake:1", healthy=True, **load) for role in ("prefill", "decode")
        ]
        return gateway_pb2.GetInfoResponse(
            version="0",
            model=MODEL,
            max_model_len=MAX_MODEL_LEN,
            tree="none",
            workers=workers,
            active_requests=self.running,
        )

    def ListModels(
        self, message: gateway_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.ListModelsResponse:
        self._note("ListModels", message, context)
        return gateway_pb2.ListModelsResponse(
            models=[gateway_pb2.ModelInfo(id=MODEL, max_model_len=MAX_MODEL_LEN, aliases=["default"])]
        )

    def GetStatus(
        self, message: gateway_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GetStatusResponse:
        self._note("GetStatus", message, context)
        requests = [
            gateway_pb2.RequestStatus(
                request_id=running.request.request_id,
                interface="grpc",
                age_s=time.monotonic() - running.began,
                prompt_tokens=len(running.request.prompt),
                completion_tokens=running.tokens,
                samples=max(1, running.request.options.n),
                priority=running.request.options.priority,
            )
            for running in self._snapshot()
        ]
        return gateway_pb2.GetStatusResponse(requests=requests, max_requests=_THREADS)

    def Abort(
        self, message: gateway_pb2.GatewayServiceAbortRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GatewayServiceAbortResponse:
        self._note("Abort", message, context)
        with self._lock:
            running = self._running.get(message.request_id)
        if running is None:
            _fail(context, Fault("NOT_FOUND", f"no request {message.request_id!r} is being served"))
        running.aborted = message.reason or "no reason was given"
        running.over.set()
        return gateway_pb2.GatewayServiceAbortResponse()

    def _generate(
        self,
        rpc: str,
        message: Any,
        context: grpc.ServicerContext,
        form: Callable[[gateway_pb2.ChatResponse], Any],
    ) -> Iterator[Any]:
        request = self._note(rpc, message, context, f"fake-{next(self._numbers)}")
        with self._served(_Running(request), context) as running:
            with self._lock:
                fault = self.faults.pop(0) if self.faults else None
            answer = answer_to(self.script, request)
            if isinstance(answer, Fault | Break):
                fault, answer = fault or answer, ""
            context.send_initial_metadata(((transport.REQUEST_ID_METADATA, request.request_id),))
            if fault is not None and not fault.after:
                _fail(context, fault)
            responses = iter(answer.responses) if isinstance(answer, Raw) else play(request, answer)
            sent = 0
            for response in responses:
                if isinstance(response, Pause):
                    running.over.wait(response.seconds)
                    continue
                if fault is not None and sent >= fault.after:
                    break
                if running.over.is_set():
                    break
                yield response if isinstance(answer, Raw) else form(response)
                sent += 1
                running.tokens += 0 if isinstance(answer, Raw) else len(response.part.token_ids)
            if running.aborted is not None:
                _fail(context, Fault("CANCELLED", f"the request was aborted: {running.aborted}"))
            if fault is not None:
                _fail(context, fault)

    @contextlib.contextmanager
    def _served(self, running: _Running, context: grpc.ServicerContext) -> Iterator[_Running]:
        """Known until the call is over: a generator may live longer, or end later."""
        name = running.request.request_id

        def over() -> None:
            running.over.set()
            with self._lock:
                self._running.pop(name, None)

        with self._lock:
            self._running[name] = running
        if not context.add_callback(over):  # it is over already
            over()
        yield running

    def _note(self, rpc: str, message: Any, context: grpc.ServicerContext, request_id: str = "") -> Request:
        metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        if self._api_key is not None and metadata.get("authorization") != f"Bearer {self._api_key}":
            _fail(context, Fault("UNAUTHENTICATED", "the API key is missing or wrong"))
        request = Request(rpc, message, metadata, request_id)
        with self._lock:
            self.requests.append(request)
        return request

    def _check_health(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        return transport.HEALTH_SERVING if self.serving else _NOT_SERVING

    def _snapshot(self) -> list[_Running]:
        with self._lock:
            return list(self._running.values())


def _fail(context: grpc.ServicerContext, fault: Fault | Break) -> NoReturn:
    if isinstance(fault, Break):
        context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
    else:
        hint = -1 if fault.retry_after is None else round(fault.retry_after * 1000)
        context.set_trailing_metadata(((RETRY_METADATA, str(hint)),))
        context.abort(grpc.StatusCode[fault.code], fault.details)
    raise AssertionError  # abort raises
