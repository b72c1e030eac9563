"""A chat's request, from OpenAI's shape to the gateway's."""

from __future__ import annotations

import json

from branchline.v1 import gateway_pb2
from gateway.http.options import generate_request
from gateway.http.schemas import ChatRequest, Message, ToolDefinition

#: OpenAI's newer name for the same thing, which models' templates don't know.
_ROLES = {"developer": "system"}


def chat_request(body: ChatRequest) -> gateway_pb2.ChatRequest:
    """Raises InvalidRequestError."""
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    arguments = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:  # for templates that know it; others don't look
        arguments.setdefault("reasoning_effort", body.reasoning_effort)
    return gateway_pb2.ChatRequest(
        messages=[_message(message) for message in body.messages],
        tools=[_tool(tool) for tool in body.tools or []],
        tool_choice=gateway_pb2.TOOL_CHOICE_NONE if body.tool_choice == "none" else gateway_pb2.TOOL_CHOICE_AUTO,
        template_arguments=json.dumps(arguments) if arguments else "",
        options=generate_request(body, max_tokens, logprobs),
    )


def _message(message: Message) -> gateway_pb2.ChatMessage:
    return gateway_pb2.ChatMessage(
        role=_ROLES.get(message.role, message.role),
        content=message.text,
        tool_calls=[
            gateway_pb2.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in message.tool_calls or []
        ],
        reasoning=message.reasoning_content or message.reasoning or "",
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
    )


def _tool(tool: ToolDefinition) -> gateway_pb2.Tool:
    function = tool.function
    return gateway_pb2.Tool(
        name=function.name,
        description=function.description or "",
        parameters="" if function.parameters is None else json.dumps(function.parameters, ensure_ascii=False),
    )
