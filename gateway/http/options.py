"""The options of a generation, from HTTP's names and defaults to the gateway's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2, types_pb2
from branchline.wire.status import RpcFailure
from gateway.desk import Desk
from gateway.http.errors import HttpError
from gateway.http.schemas import Sampling
from gateway.model import Model
from gateway.validate import MAX_SESSION_CHARS

#: OpenAI's default, where the gateway's own is greedy.
TEMPERATURE = 1.0
SESSION_HEADER = "x-session-id"


def find_model(name: str, desk: Desk) -> Model:
    """Raises HttpError for a model that is not served, and for none: OpenAI's API has no default."""
    if name:
        with contextlib.suppress(RpcFailure):
            return desk.model(name)
    raise HttpError(404, f"The model '{name}' does not exist.", "model", "model_not_found")


def session_name(headers: Mapping[str, str], body: Sampling) -> str:
    """What the request belongs to, for routing only: as the client names it in a header, else as OpenAI's clients do.
    "" for none."""
    name = headers.get(SESSION_HEADER) or body.prompt_cache_key or body.user or ""
    return name[:MAX_SESSION_CHARS]  # nothing that OpenAI takes is refused for it


def generate_request(body: Sampling, max_tokens: int | None, logprobs: int | None) -> gateway_pb2.GenerateRequest:
    """Without an input. Raises InvalidRequestError."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    request = gateway_pb2.GenerateRequest(  # None leaves a field unset
        max_tokens=max_tokens,
        temperature=TEMPERATURE if body.temperature is None else body.temperature,
        top_p=body.top_p,
        top_k=_top_k(body.top_k),
        seed=_seed(body.seed),
        stop=stop,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=body.stop_token_ids or [],
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        bad_words=body.bad_words or [],
        min_tokens=body.min_tokens,
        logprobs=logprobs,
        n=body.n,
        draft_nodes=body.draft_nodes,
        priority=body.priority,
    )
    for token_id, bias in (body.logit_bias or {}).items():
        request.logit_bias.append(types_pb2.LogitBias(token_id=int(token_id), bias=bias))
    return request


def _seed(seed: int | None) -> int | None:
    """OpenAI's seeds have a sign, ours have none: of negative ones the lower 63 bits count."""
    return None if seed is None else seed & (2**63 - 1)


def _top_k(top_k: int | None) -> int | None:
    """vLLM writes -1 for all tokens; here that is 0."""
    if top_k is not None and top_k < -1:
        raise InvalidRequestError(f"top_k must be positive, or 0 or -1 for all tokens, got {top_k}")
    return 0 if top_k == -1 else top_k
