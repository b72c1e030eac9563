"""What a fake server says, and to whom.

Its tokens are characters: a token's id is the character's code point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from branchline.client.chat import ToolCall
from branchline.client.results import Chunk
from branchline.core import FinishReason, SpeculationStats, TokenLogprobs
from branchline.v1 import gateway_pb2, types_pb2

_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing comes for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Fault:
    """The call ends with a status: gRPC's name of it (`"RESOURCE_EXHAUSTED"`), after so many responses. `retry_after`
    is the hint, in seconds; None says, as a gateway does then, that trying again is of no use.
    """

    code: str
    details: str = "as the test asked"
    retry_after: float | None = None
    after: int = 0


@dataclass(frozen=True, slots=True)
class Break:
    """The call ends as it does when the connection is lost, after so many responses: UNAVAILABLE without any hint."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Raw:
    """Messages that are sent as they are, GenerateResponse or ChatResponse: for what no right server would send."""

    responses: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """A sample. `parts` is its text, of which each character is a chunk; or a list of chunks: strings, pauses, and
    `Chunk`s where token ids or log-probabilities matter.
    """

    parts: str | Sequence[str | Chunk | Pause] = ""
    finish_reason: FinishReason = FinishReason.STOP
    #: Of a chat: they come before and behind the text.
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()
    cached_tokens: int = 0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    failovers: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A call that came. `message` is the protobuf message of the RPC, `metadata` what came beside it."""

    rpc: str
    message: Any
    metadata: Mapping[str, str]
    #: What `Client.status()` and `abort` call it; empty for calls that don't generate.
    request_id: str = ""

    @property
    def options(self) -> gateway_pb2.GenerateRequest:
        """Of a call that generates."""
        message = self.message.options if self.rpc == "Chat" else self.message
        assert isinstance(message, gateway_pb2.GenerateRequest), f"{self.rpc} does not generate"
        return message

    @property
    def prompt(self) -> str:
        """Of a call that generates: its text, or the last message's of a chat."""
        if self.rpc == "Chat":
            return _last(self.message.messages)
        match self.message.WhichOneof("input"):
            case "chat":
                return _last(self.message.chat.messages)
            case "token_ids":
                return "".join(map(chr, self.message.token_ids.ids))
        return str(self.message.prompt)


#: To one request: text or a Reply for every sample, or a list of Replies with one for each; or what goes wrong.
Answer = str | Reply | Sequence[Reply] | Raw | Fault | Break
#: One answer to all requests, or by their prompts, or whatever a function makes of them.
Script = Answer | Mapping[str, Answer] | Callable[[Request], Answer]


def answer_to(script: Script, request: Request) -> Answer:
    """A Fault for a prompt that the script does not know."""
    if callable(script):
        return script(request)
    if isinstance(script, Mapping):
        unknown = Fault("INVALID_ARGUMENT", f"the fake server has no answer to {request.prompt!r}")
        return script.get(request.prompt, unknown)
    return script


def play(request: Request, answer: Answer) -> Iterator[gateway_pb2.ChatResponse | Pause]:
    """The responses of all samples, side by side; without what the client says that it has received."""
    options, chat = request.options, request.rpc == "Chat"
    samples = max(1, options.n)
    every = Reply(answer) if isinstance(answer, str) else answer
    replies = [every] * samples if isinstance(every, Reply) else every
    assert isinstance(replies, Sequence), f"no answer: {answer!r}"
    assert len(replies) == samples, f"{samples} samples are wanted, and there are {len(replies)} replies"
    streams = [
        _sample(request, reply, number, chat)
        for number, reply in enumerate(replies)
        if not (options.received and options.received[number].finished)
    ]
    while streams:
        for stream in tuple(streams):
            response = next(stream, None)
            if response is None:
                streams.remove(stream)
            else:
                yield response


def _sample(request: Request, reply: Reply, number: int, chat: bool) -> Iterator[gateway_pb2.ChatResponse | Pause]:
    options = request.options
    had = len(options.received[number].token_ids) if options.received else 0
    tokens = 0
    if chat and reply.reasoning and not had:
        yield _part(number, reasoning=reply.reasoning)
    for part in reply.parts:
        if isinstance(part, Pause):
            if tokens >= had:
                yield part
            continue
        chunk = part if isinstance(part, Chunk) else Chunk(part, tuple(map(ord, part)))
        first, tokens = tokens, tokens + len(chunk.token_ids)
        if had and tokens <= had:
            continue
        if options.HasField("logprobs") and not chunk.logprobs:
            chunk = dataclasses.replace(chunk, logprobs=_logprobs(chunk, first, options.logprobs))
        yield _part(number, chunk)
    for index, call in enumerate(reply.tool_calls if chat else ()):
        begin = gateway_pb2.ToolCallPart(index=index, id=call.id, name=call.name)
        rest = gateway_pb2.ToolCallPart(index=index, arguments=call.arguments)
        yield _part(number, tool_calls=[begin])
        yield _part(number, tool_calls=[rest])
    finished = gateway_pb2.Completion(
        finish_reason=_REASONS[reply.finish_reason],
        usage=gateway_pb2.Usage(
            prompt_tokens=len(request.prompt), completion_tokens=tokens, cached_tokens=reply.cached_tokens
        ),
        speculation=types_pb2.Speculation(
            target_forwards=reply.speculation.target_forwards,
            drafted=reply.speculation.drafted,
            accepted=reply.speculation.accepted,
        ),
        seed=options.seed,
        failovers=reply.failovers,
        preemptions=reply.preemptions,
    )
    yield gateway_pb2.ChatResponse(part=gateway_pb2.GenerateResponse(sample=number, finished=finished))


def _part(number: int, chunk: Chunk | None = None, **more: Any) -> gateway_pb2.ChatResponse:
    part = gateway_pb2.GenerateResponse(sample=number)
    if chunk is not None:
        part.text = chunk.text
        part.token_ids.extend(chunk.token_ids)
        for entry in chunk.logprobs:
            ids, values = [token_id for token_id, _ in entry.top], [value for _, value in entry.top]
            part.logprobs.add(logprob=entry.logprob, top_token_ids=ids, top_logprobs=values)
    return gateway_pb2.ChatResponse(part=part, **more)


def _logprobs(chunk: Chunk, first: int, most: int) -> tuple[TokenLogprobs, ...]:
    """Made up: each token was the likeliest one, and those behind it in the alphabet are less likely. `first` is the
    chunk's position in the output.
    """
    return tuple(
        TokenLogprobs(-position - 0.5, tuple((token_id + rank, -position - rank - 0.5) for rank in range(most)))
        for position, token_id in enumerate(chunk.token_ids, first)
    )


def _last(messages: Sequence[gateway_pb2.ChatMessage]) -> str:
    return messages[-1].content if messages else ""
