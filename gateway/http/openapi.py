"""The HTTP API in OpenAPI's terms, from the types that requests are checked with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from branchline.observe.metrics import version
from gateway.http.schemas import ChatRequest, CompletionRequest

_REF = "#/components/schemas/"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1. Answers are OpenAI's own, of which it says no more than the media type."""
    requests = (CompletionRequest, ChatRequest)
    _, definitions = models_json_schema([(one, "validation") for one in requests], ref_template=_REF + "{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Branchline", "version": version()},
        "paths": {
            "/v1/completions": {"post": _generates("Complete a text", "CompletionRequest")},
            "/v1/chat/completions": {"post": _generates("Answer a conversation", "ChatRequest")},
            "/v1/models": {"get": _page("What is served")},
            "/v1/models/{name}": {
                "get": {
                    **_page("One model"),
                    "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
                }
            },
            "/health": {"get": _page("Whether requests can be served")},
            "/version": {"get": _page("Branchline's version")},
            "/metrics": {"get": _page("Metrics for Prometheus", "text/plain")},
        },
        "components": {"schemas": {**definitions["$defs"], "Error": _ERROR}},
    }


def _generates(summary: str, request: str) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": _REF + request}}}}
    return {**_page(summary, "application/json", "text/event-stream"), "requestBody": body}


def _page(summary: str, *media: str) -> dict[str, Any]:
    answers: Mapping[str, Any] = {kind: {} for kind in media or ("application/json",)}
    error = {"application/json": {"schema": {"$ref": _REF + "Error"}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": answers},
            "default": {"description": "Why there is none.", "content": error},
        },
    }
