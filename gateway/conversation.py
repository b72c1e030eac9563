"""A chat as the model's template reads it, made from the messages of the wire."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2
from gateway.limits import Limits

MAX_TOOLS = 128
#: Variables of a template that the gateway, or transformers for it, sets; and arguments of its functions.
RESERVED = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("enable_tracker", "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict"),
        *("return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Plain values for the template: what its variables `messages` and `tools` hold, and more variables."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    #: Characters in all: what rendering and encoding cost.
    size: int = 0


def conversation(request: gateway_pb2.ChatRequest, limits: Limits, longest_token: int) -> Conversation:
    """Raises InvalidRequestError, naming the field: for what no template could render, and, before anything is
    parsed, for what can't fit the context even if every token had `longest_token` characters.
    """
    if not request.messages:
        raise InvalidRequestError("chat.messages: at least one message must be given")
    if len(request.messages) > limits.max_model_len:
        raise InvalidRequestError(f"chat.messages: {len(request.messages)} are too many for the context limit")
    if len(request.tools) > MAX_TOOLS:
        raise InvalidRequestError(f"chat.tools: at most {MAX_TOOLS}, got {len(request.tools)}")
    size = _size(request)
    if size > limits.max_model_len * longest_token:
        raise InvalidRequestError(
            f"chat: too long: {size} characters can't fit the context limit of {limits.max_model_len} tokens"
        )
    tools = () if request.tool_choice == gateway_pb2.TOOL_CHOICE_NONE else tuple(_tools(request.tools))
    return Conversation(
        messages=tuple(_message(index, message) for index, message in enumerate(request.messages)),
        tools=tools,
        arguments=_arguments(request.template_arguments),
        size=size,
    )


def _size(request: gateway_pb2.ChatRequest) -> int:
    messages = sum(
        len(message.role)
        + len(message.content)
        + len(message.reasoning)
        + sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
        for message in request.messages
    )
    tools = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in request.tools)
    return messages + tools + len(request.template_arguments)


def _message(index: int, message: gateway_pb2.ChatMessage) -> dict[str, Any]:
    """What templates expect is what OpenAI's API has, except that a call's arguments are a mapping."""
    where = f"chat.messages[{index}]"
    if not message.role:
        raise InvalidRequestError(f"{where}.role: must not be empty")
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        values["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _json_object(f"{where}.tool_calls[{number}].arguments", call.arguments or "{}"),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    if message.reasoning:
        values["reasoning_content"] = message.reasoning
    for name in ("tool_call_id", "name"):
        if value := getattr(message, name):
            values[name] = value
    return values


def _tools(tools: Sequence[gateway_pb2.Tool]) -> Iterable[dict[str, Any]]:
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if not tool.name:
            raise InvalidRequestError(f"chat.tools[{index}].name: must not be empty")
        if tool.name in names:
            raise InvalidRequestError(f"chat.tools[{index}].name: there is another tool named {tool.name!r}")
        names.add(tool.name)
        function: dict[str, Any] = {"name": tool.name}
        if tool.description:
            function["description"] = tool.description
        schema = tool.parameters or '{"type": "object", "properties": {}}'
        function["parameters"] = _json_object(f"chat.tools[{index}].parameters", schema)
        yield {"type": "function", "function": function}


def _arguments(text: str) -> dict[str, Any]:
    arguments = _json_object("chat.template_arguments", text) if text else {}
    if reserved := RESERVED & arguments.keys():
        raise InvalidRequestError(f"chat.template_arguments: {', '.join(sorted(reserved))} can't be set")
    return arguments


def _json_object(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{where}: must be a JSON object, as text") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value
