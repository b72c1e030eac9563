"""Chats: what goes in, the request message made of it, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

from branchline.client.collect import Collector
from branchline.client.errors import InvalidRequestError
from branchline.client.options import SamplingOptions, sampling_request
from branchline.client.results import Chunk, Completion
from branchline.client.values import text_value
from branchline.v1 import gateway_pb2

_CHOICES = {"auto": gateway_pb2.TOOL_CHOICE_AUTO, "none": gateway_pb2.TOOL_CHOICE_NONE}
_MESSAGE_KEYS = {"role", "content", "tool_calls", "reasoning", "tool_call_id", "name"}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model asks for. `arguments` is JSON, as the model has written it."""

    id: str
    name: str
    arguments: str


class ChatOptions(SamplingOptions, total=False):
    """Keyword arguments of `chat` and `complete_chat`; `messages` is needed."""

    #: [{"role": "user", "content": "…"}, …]; an assistant's may have tool_calls (of ToolCall) and reasoning, a tool's
    #: tool_call_id. `Answer.message` is one.
    messages: Sequence[Mapping[str, Any]]
    #: Functions that the model may call: {"name": …, "description": …, "parameters": {JSON Schema}}, or as OpenAI
    #: writes them.
    tools: Sequence[Mapping[str, Any]]
    #: "auto", the default, or "none": the tools are not shown to the model.
    tool_choice: Literal["auto", "none"]
    #: More variables for the model's chat template, such as {"enable_thinking": False}.
    template_arguments: Mapping[str, Any] | None


def chat_request(
    *,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: Literal["auto", "none"] = "auto",
    template_arguments: Mapping[str, Any] | None = None,
    **options: Unpack[SamplingOptions],
) -> gateway_pb2.ChatRequest:
    """Raises InvalidRequestError, naming the option, for a value that the message cannot carry."""
    if isinstance(messages, str | Mapping):
        raise InvalidRequestError("messages: must be a list of {'role': …, 'content': …}")
    if isinstance(tools, str | Mapping):
        raise InvalidRequestError("tools: must be a list of {'name': …, 'parameters': …}")
    if tool_choice not in _CHOICES:
        raise InvalidRequestError(f"tool_choice: must be 'auto' or 'none', got {tool_choice!r}")
    return gateway_pb2.ChatRequest(
        messages=[_message(f"messages[{index}]", message) for index, message in enumerate(messages)],
        tools=[_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools)],
        tool_choice=_CHOICES[tool_choice],
        template_arguments=_json("template_arguments", template_arguments) if template_arguments else "",
        options=sampling_request(**options),
    )


def _message(where: str, message: Mapping[str, Any]) -> gateway_pb2.ChatMessage:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message) <= _MESSAGE_KEYS:
        raise InvalidRequestError(
            f"{where}: must have the keys 'role' and 'content', and may have {', '.join(sorted(_MESSAGE_KEYS))};"
            f" got {message!r}"
        )
    texts = {
        key: text_value(f"{where}.{key}", value)
        for key, value in message.items()
        if key != "tool_calls" and value is not None
    }
    calls = message.get("tool_calls") or ()
    if not all(isinstance(call, ToolCall) for call in calls):
        raise InvalidRequestError(f"{where}.tool_calls: must be a list of ToolCall")
    return gateway_pb2.ChatMessage(
        tool_calls=[gateway_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls],
        **texts,
    )


def _tool(where: str, tool: Mapping[str, Any]) -> gateway_pb2.Tool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise InvalidRequestError(f"{where}: must have a name, got {tool!r}")
    parameters = function.get("parameters")
    return gateway_pb2.Tool(
        name=text_value(f"{where}.name", function["name"]),
        description=text_value(f"{where}.description", function.get("description") or ""),
        parameters="" if parameters is None else _json(f"{where}.parameters", parameters),
    )


def _json(where: str, value: Any) -> str:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{where}: must be a mapping, got {type(value).__name__}")
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where}: has no JSON form: {error}") from None


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """A part of a stream. `part` has the sample, the token ids and the rest; `text` is content only."""

    part: Chunk
    reasoning: str = ""
    #: Calls that have begun, by their number: each a piece of a call, with id and name in the first one of each.
    tool_calls: tuple[tuple[int, ToolCall], ...] = ()

    @property
    def text(self) -> str:
        return self.part.text


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the `n` answers of a finished chat."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]

    @property
    def message(self) -> dict[str, Any]:
        """For the next request's `messages`."""
        return {"role": "assistant", "content": self.text, "tool_calls": self.tool_calls, "reasoning": self.reasoning}


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """A finished chat request; `answers` has `n` of them, in order."""

    answers: tuple[Answer, ...]
    #: Finish reason, usage, seed and the rest, as of a completion; its texts are content only.
    completion: Completion

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.answers[0].text

    @property
    def reasoning(self) -> str:
        """Of the first answer."""
        return self.answers[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Of the first answer."""
        return self.answers[0].tool_calls


@dataclass(slots=True)
class _Sample:
    reasoning: str = ""
    calls: dict[int, ToolCall] = field(default_factory=dict)


class ChatCollector:
    """Adds up the responses of one Chat call, from the moment it is made."""

    def __init__(self, samples: int = 1) -> None:
        self._parts = Collector(samples)
        self._samples = [_Sample() for _ in range(samples)]

    def add(self, response: gateway_pb2.ChatResponse) -> ChatChunk | None:
        """The response's chunk, None when it carries nothing."""
        part = self._parts.add(response.part)
        sample = self._samples[response.part.sample]
        sample.reasoning += response.reasoning
        pieces = []
        for message in response.tool_calls:
            piece = ToolCall(message.id, message.name, message.arguments)
            known = sample.calls.get(message.index, ToolCall("", "", ""))
            sample.calls[message.index] = ToolCall(
                known.id + piece.id, known.name + piece.name, known.arguments + piece.arguments
            )
            pieces.append((message.index, piece))
        if part is None and not response.reasoning and not pieces:
            return None
        return ChatChunk(part or Chunk("", (), response.part.sample), response.reasoning, tuple(pieces))

    @property
    def result(self) -> ChatCompletion | None:
        """None until the last response of every sample has come."""
        completion = self._parts.result
        if completion is None:
            return None
        answers = tuple(
            Answer(text.text, sample.reasoning, tuple(sample.calls[index] for index in sorted(sample.calls)))
            for text, sample in zip(completion.samples, self._samples, strict=True)
        )
        return ChatCompletion(answers, completion)

    def received(self) -> list[gateway_pb2.ReceivedSample]:
        """What has come of each sample, for a request to go on behind it."""
        return self._parts.received()

    def finish(self) -> None:
        """To be called when the stream has ended well. Raises ServerError when a last response is missing."""
        self._parts.finish()
