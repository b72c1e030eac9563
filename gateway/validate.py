"""A client's request to journal entries: everything checked, every default resolved.

All errors are InvalidRequestError and name the field. The cheap checks come first: nothing is tokenised for a request
that is refused anyway.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

from branchline.core import MAX_LOGPROBS, MAX_PRIORITY, MAX_SAMPLES, MAX_STOP_TOKEN_IDS, InvalidRequestError
from branchline.v1 import gateway_pb2
from gateway.conversation import Conversation
from gateway.journal import JournalEntry
from gateway.limits import Limits, check_ids, check_range
from gateway.prompts import prompt_ids
from gateway.resume import check_received, received_samples
from gateway.sampling import sampling_params
from gateway.tokens import Tokens

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_OWN_STOP_TOKEN_IDS = 4
MAX_SESSION_CHARS = 1024
#: More than any tree has; so that the number fits the workers' messages.
MAX_DRAFT_NODES = 1 << 20


async def resolve(
    request: gateway_pb2.GenerateRequest,
    tokens: Tokens,
    limits: Limits,
    arrived: float,
    *,
    request_id: str = "",
    chat: Conversation | None = None,
) -> tuple[JournalEntry, ...]:
    """One entry for each sample. `arrived`: when the client asked, on the monotonic clock. `request_id` is drawn if
    none is given; a `chat` is the input in place of the request's own.

    Raises InvalidRequestError.
    """
    sampling = sampling_params(request, tokens)
    stop = _stop_strings(request.stop)
    stop_token_ids = _stop_token_ids(request, tokens)
    samples = check_range("n", request.n, 1, MAX_SAMPLES) if request.HasField("n") else 1
    logprobs = check_range("logprobs", request.logprobs, 0, MAX_LOGPROBS) if request.HasField("logprobs") else None
    draft_nodes = (
        check_range("draft_nodes", request.draft_nodes, 0, MAX_DRAFT_NODES) if request.HasField("draft_nodes") else None
    )
    priority = check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    if len(request.session) > MAX_SESSION_CHARS:
        raise InvalidRequestError(f"session: at most {MAX_SESSION_CHARS} characters, got {len(request.session)}")
    received = received_samples(request, samples, tokens.vocab_size)
    if request.HasField("max_tokens"):
        _check_max_tokens(request.max_tokens, limits)
    _check_min_tokens(request, limits)
    prompt = await prompt_ids(request, tokens, limits, chat)
    max_tokens = _max_tokens(request, len(prompt), limits)
    check_received(received, max_tokens, stop_token_ids)
    request_id = request_id or secrets.token_hex(8)
    return tuple(
        JournalEntry(
            request_id=request_id if samples == 1 else f"{request_id}.{index}",
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=dataclasses.replace(sampling, sample_index=index),
            stop_token_ids=stop_token_ids,
            stop=stop,
            min_tokens=request.min_tokens,
            logprobs=logprobs,
            draft_nodes=draft_nodes,
            priority=priority,
            session=request.session,
            arrived=arrived,
            emitted=list(received[index].token_ids),
            settled=received[index].finished,
        )
        for index in range(samples)
    )


def _stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(f"stop: at most {MAX_STOPS} strings, got {len(stops)}")
    for index, stop in enumerate(stops):
        if not stop:
            raise InvalidRequestError(f"stop[{index}]: must not be empty")
        if len(stop) > MAX_STOP_CHARS:
            raise InvalidRequestError(f"stop[{index}]: at most {MAX_STOP_CHARS} characters, got {len(stop)}")
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(request: gateway_pb2.GenerateRequest, tokens: Tokens) -> tuple[int, ...]:
    own = request.stop_token_ids
    if len(own) > MAX_OWN_STOP_TOKEN_IDS:
        raise InvalidRequestError(f"stop_token_ids: at most {MAX_OWN_STOP_TOKEN_IDS}, got {len(own)}")
    check_ids("stop_token_ids", own, tokens.vocab_size)
    ids = tuple(dict.fromkeys([*(() if request.ignore_eos else tokens.eos_ids), *own]))
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"stop_token_ids: with the model's {len(tokens.eos_ids)} end-of-sequence tokens these are {len(ids)},"
            f" at most {MAX_STOP_TOKEN_IDS} can be watched"
        )
    return ids


def _check_min_tokens(request: gateway_pb2.GenerateRequest, limits: Limits) -> None:
    most = request.max_tokens if request.HasField("max_tokens") else limits.max_tokens
    if not 0 <= request.min_tokens <= most:
        raise InvalidRequestError(
            f"min_tokens: must be between 0 and max_tokens, which is {most}, got {request.min_tokens}"
        )


def _check_max_tokens(max_tokens: int, limits: Limits) -> None:
    if max_tokens < 1:
        raise InvalidRequestError(f"max_tokens: must be at least 1, got {max_tokens}")
    if max_tokens > limits.max_tokens:
        raise InvalidRequestError(f"max_tokens: this gateway allows at most {limits.max_tokens}, got {max_tokens}")


def _max_tokens(request: gateway_pb2.GenerateRequest, prompt_length: int, limits: Limits) -> int:
    left = limits.max_model_len - prompt_length
    if not request.HasField("max_tokens"):
        return min(left, limits.max_tokens)
    if request.max_tokens > left:
        raise InvalidRequestError(
            f"max_tokens: a prompt of {prompt_length} tokens leaves {left} of the context limit of"
            f" {limits.max_model_len}, got {request.max_tokens}"
        )
    return request.max_tokens
