"""The routes of OpenAI's API, and what answers where there is none."""

from __future__ import annotations

import time
from typing import Any

from openai.types import Model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from branchline.core import InvalidRequestError
from branchline.observe.exposition import CONTENT_TYPE, PATH, page
from branchline.observe.metrics import version
from branchline.wire.status import RpcFailure
from gateway.desk import Desk
from gateway.door import Call
from gateway.http.chat import ChatEndpoint
from gateway.http.completions import CompletionEndpoint
from gateway.http.crowd import Crowd
from gateway.http.errors import HttpError, from_failure, phrase
from gateway.http.exchange import PostJson
from gateway.http.openapi import document
from gateway.http.options import find_model
from gateway.http.schemas import ChatRequest, CompletionRequest
from gateway.model import Model as Served

OWNER = "branchline"


def application(desk: Desk, max_requests: int) -> ASGIApp:
    """Belongs to the desk's event loop. `max_requests`: that are read or answered at once."""
    pages = _Pages(desk)
    pages_and_endpoints = Starlette(
        routes=[
            Route(
                "/v1/completions",
                PostJson(desk, CompletionRequest, CompletionEndpoint(desk).handle),
                methods=["POST"],
            ),
            Route("/v1/chat/completions", PostJson(desk, ChatRequest, ChatEndpoint(desk).handle), methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/{name:path}", pages.model),
            Route("/health", pages.health),
            Route("/version", pages.version),
            Route("/openapi.json", pages.openapi),
            Route(PATH, pages.metrics),
        ],
        exception_handlers={
            HTTPException: _no_such_page,
            HttpError: _refused,
            RpcFailure: _refused,
            InvalidRequestError: _refused,
        },
    )
    return Crowd(pages_and_endpoints, max_requests)


class _Pages:
    """Answers that take no work."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        self._greet(request)
        models = [self._described(model.name, model) for model in self._desk.models]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, request: Request) -> Response:
        self._greet(request)
        name = request.path_params["name"]
        return JSONResponse(self._described(name, find_model(name, self._desk)))

    async def health(self, _request: Request) -> Response:
        """Open to everybody: load balancers have no key."""
        if not self._desk.can_serve:
            raise HttpError(
                503, "there is no prefill and decode worker that fit together", headers={"retry-after": "1"}
            )
        return JSONResponse({"status": "ok"})

    async def version(self, request: Request) -> Response:
        self._greet(request)
        return JSONResponse({"version": version()})

    async def openapi(self, request: Request) -> Response:
        self._greet(request)
        return JSONResponse(document())

    async def metrics(self, request: Request) -> Response:
        """Whoever may not call may not see what is called either; a port of its own is `gateway.metrics_port`."""
        self._greet(request)
        return Response(page(self._desk.registry), media_type=CONTENT_TYPE)

    def _greet(self, request: Request) -> None:
        self._desk.door.greet(Call("http", request.url.path, dict(request.headers)))

    def _described(self, name: str, served: Served) -> dict[str, Any]:
        model = Model(id=name, object="model", created=self._created, owned_by=OWNER)
        # As vLLM has it: clients that fit their prompts to a model look here.
        return {**model.model_dump(exclude_unset=True), "max_model_len": served.max_model_len}


async def _no_such_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    what = f"{request.method} {request.url.path}"
    message = f"There is no {what}." if error.status_code in (404, 405) else phrase(error.status_code)
    return _response(HttpError(error.status_code, message, code="unknown_url", headers=headers))


async def _refused(_request: Request, error: Exception) -> Response:
    if isinstance(error, RpcFailure | InvalidRequestError):
        error = from_failure(error)
    assert isinstance(error, HttpError)
    return _response(error)


def _response(error: HttpError) -> Response:
    return JSONResponse(error.body, error.status, dict(error.headers))
