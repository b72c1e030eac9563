"""What calls return: immutable values."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from branchline.core import FinishReason, SpeculationStats, TokenLogprobs
from branchline.v1 import gateway_pb2


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a stream. Text is whole characters only, so `text` may be empty, and so may `token_ids`."""

    text: str
    token_ids: tuple[int, ...]
    #: Which of the `n` samples it belongs to, from 0.
    sample: int = 0
    #: As many as `token_ids` when they were asked for, else none.
    logprobs: tuple[TokenLogprobs, ...] = ()
    #: Set in the last chunk of a sample.
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that went in and came out."""

    prompt_tokens: int
    completion_tokens: int
    #: Of the prompt's tokens those that an earlier request's computation was good for.
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One of the `n` samples of a finished request."""

    text: str
    token_ids: tuple[int, ...]
    #: Compares equal to the strings "stop" and "length".
    finish_reason: FinishReason
    #: For each token its `.logprob`, and the likeliest ones' in `.top` as (token id, log-probability), falling: the
    #: model's own, before penalties, temperature and filters. Empty unless asked for.
    logprobs: tuple[TokenLogprobs, ...]
    #: `.target_forwards`, `.drafted`, `.accepted` and `.acceptance_length`.
    speculation: SpeculationStats
    #: Times it moved to other workers after a failure.
    failovers: int
    #: Times a decode worker took its blocks back for another request.
    preemptions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, fit for JSON."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        values["speculation"]["acceptance_length"] = self.speculation.acceptance_length
        return values


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. What is one sample's is sample 0's here; `samples` has those of all."""

    text: str
    token_ids: tuple[int, ...]
    #: Compares equal to the strings "stop" and "length".
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...]
    #: The prompt once, and the tokens of all samples.
    usage: Usage
    #: Of all samples together.
    speculation: SpeculationStats
    #: The seed in effect; sent again with the same input and options it gives the same tokens.
    seed: int
    #: Times that samples moved to other workers after a failure, and that decode workers took blocks back.
    failovers: int
    preemptions: int
    #: `n` of them, in the order of their numbers.
    samples: tuple[Sample, ...]
    #: Seconds on this side's monotonic clock from the call to its first token, of any sample, and to its end.
    time_to_first_token_s: float
    duration_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, fit for JSON."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        values["speculation"]["acceptance_length"] = self.speculation.acceptance_length
        values["samples"] = [sample.to_dict() for sample in self.samples]
        return values


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as the gateway sees it. `role` is "prefill" or "decode"."""

    role: str
    address: str
    healthy: bool
    blocks_total: int
    blocks_used: int
    #: Requests queued or running there; a decode worker's leases.
    requests: int
    #: Unfinished asynchronous tasks that serve a request.
    tasks: int
    #: The name of the model that it has.
    model: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What is being served, and the load now."""

    version: str
    model: str
    #: The longest sequence in tokens, prompt included.
    max_model_len: int
    #: The draft tree's specification, "none" without one.
    tree: str
    workers: tuple[Worker, ...]
    active_requests: int


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served. `id` is its name over HTTP, `aliases` are others that mean it, too."""

    id: str
    max_model_len: int
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request that the gateway is serving."""

    request_id: str
    #: How it came: "grpc" or "http".
    interface: str
    #: Seconds since it came.
    age_s: float
    prompt_tokens: int
    #: Of all samples together, so far.
    completion_tokens: int
    samples: int
    priority: int


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """What the gateway is serving now, the oldest first."""

    requests: tuple[RunningRequest, ...]
    #: Requests that it serves at once at most.
    max_requests: int


def models(message: gateway_pb2.ListModelsResponse) -> tuple[Model, ...]:
    return tuple(Model(model.id, model.max_model_len, tuple(model.aliases)) for model in message.models)


def gateway_status(message: gateway_pb2.GetStatusResponse) -> GatewayStatus:
    requests = tuple(
        RunningRequest(
            request_id=request.request_id,
            interface=request.interface,
            age_s=request.age_s,
            prompt_tokens=request.prompt_tokens,
            completion_tokens=request.completion_tokens,
            samples=request.samples,
            priority=request.priority,
        )
        for request in message.requests
    )
    return GatewayStatus(requests, message.max_requests)


def server_info(message: gateway_pb2.GetInfoResponse) -> ServerInfo:
    workers = tuple(
        Worker(
            role=worker.role,
            address=worker.address,
            healthy=worker.healthy,
            blocks_total=worker.blocks_total,
            blocks_used=worker.blocks_used,
            requests=worker.requests,
            tasks=worker.tasks,
            model=worker.model,
        )
        for worker in message.workers
    )
    return ServerInfo(
        version=message.version,
        model=message.model,
        max_model_len=message.max_model_len,
        tree=message.tree,
        workers=workers,
        active_requests=message.active_requests,
    )


def _plain(value: Any) -> Any:
    """Tuples become lists and enumerations their values, however deep."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case tuple() | list():
            return [_plain(item) for item in value]
        case enum.Enum():
            return value.value
    return value
