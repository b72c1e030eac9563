"""What calls return: immutable values, and the sum of a stream's parts."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from branchline.client.errors import ServerError
from branchline.core import FinishReason, SpeculationStats
from branchline.v1 import gateway_pb2, types_pb2

_FINISH_REASONS = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a stream. Text is whole characters only, so `text` may be empty, and so may `token_ids`."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that went in and came out."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request."""

    text: str
    token_ids: tuple[int, ...]
    #: Compares equal to the strings "stop" and "length".
    finish_reason: FinishReason
    usage: Usage
    #: `.target_forwards`, `.drafted`, `.accepted` and `.acceptance_length`.
    speculation: SpeculationStats
    #: The seed in effect; sent again with the same input and options it gives the same tokens.
    seed: int
    #: Times the request moved to other workers after a failure.
    failovers: int
    #: Seconds on this side's monotonic clock from the call to its first token and to its end.
    time_to_first_token_s: float
    duration_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, fit for JSON."""
        values = dataclasses.asdict(self)
        values["token_ids"] = list(self.token_ids)
        values["finish_reason"] = self.finish_reason.value
        values["speculation"]["acceptance_length"] = self.speculation.acceptance_length
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


class Collector:
    """Adds up the responses of one Generate call, from the moment it is made."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first_token_s: float | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._result: Completion | None = None

    def add(self, response: gateway_pb2.GenerateResponse) -> Chunk | None:
        """The response's chunk, None when it carries neither text nor tokens."""
        chunk = Chunk(response.text, tuple(response.token_ids))
        if chunk.token_ids and self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._started
        self._text.append(chunk.text)
        self._token_ids += chunk.token_ids
        if response.HasField("finished"):
            self._result = self._complete(response.finished)
        return chunk if chunk.text or chunk.token_ids else None

    @property
    def result(self) -> Completion | None:
        """None until the last response has come."""
        return self._result

    def finish(self) -> None:
        """To be called when the stream has ended well. Raises ServerError when its last response is missing."""
        if self._result is None:
            raise ServerError("the stream ended without a result", "DATA_LOSS")

    def _complete(self, message: gateway_pb2.Completion) -> Completion:
        reason = _FINISH_REASONS.get(message.finish_reason)
        if reason is None:
            raise ServerError(f"the server gave the unknown finish reason {message.finish_reason}", "INTERNAL")
        duration = time.monotonic() - self._started
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            usage=Usage(message.usage.prompt_tokens, message.usage.completion_tokens),
            speculation=SpeculationStats(
                target_forwards=message.speculation.target_forwards,
                drafted=message.speculation.drafted,
                accepted=message.speculation.accepted,
            ),
            seed=message.seed,
            failovers=message.failovers,
            time_to_first_token_s=duration if self._first_token_s is None else self._first_token_s,
            duration_s=duration,
        )
