"""vLLM's parsers of reasoning and tool calls, behind `gateway.parsing`.

Imported only where one is configured: it takes vLLM ten seconds and 150 MiB. Of vLLM's server nothing is used but the
request that its parsers look into.
"""

from __future__ import annotations

import json
import logging
import secrets
import traceback
from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import Parser, ParserManager

from branchline.config import ConfigError
from branchline.v1 import gateway_pb2
from gateway.parsing import Parsed

logger = logging.getLogger(__name__)
logging.getLogger("vllm").setLevel(logging.ERROR)


class VllmParsers:
    """Belongs to one event loop."""

    def __init__(self, tokenizer: Any, tool_parser: str, reasoning_parser: str) -> None:
        """The parsers by vLLM's names, "" for none. Raises ConfigError for one that vLLM does not know, or whose marks
        the model's tokenizer does not know.
        """
        self.reads_tools = bool(tool_parser)
        self._tokenizer = tokenizer
        try:
            kind = ParserManager.get_parser(
                tool_parser_name=tool_parser or None,
                reasoning_parser_name=reasoning_parser or None,
                enable_auto_tools=True,
                tokenizer=tokenizer,
            )
        except TypeError as error:  # what vLLM raises for both
            names = f"{tool_parser or 'no tool parser'}, {reasoning_parser or 'no reasoning parser'}"
            raise ConfigError(f"gateway.tool_parser, gateway.reasoning_parser: {names}: {error}") from error
        assert kind is not None
        self._kind: type[Parser] = kind

    def shows_special_tokens(self, request: gateway_pb2.ChatRequest) -> bool:
        values = _request(request)
        return not self._parser(values).adjust_request(values).skip_special_tokens

    def for_sample(self, request: gateway_pb2.ChatRequest, prompt: Sequence[int]) -> VllmSampleParser:
        values = _request(request)
        return VllmSampleParser(self._parser(values), values, list(prompt))

    def _parser(self, request: ChatCompletionRequest) -> Parser:
        arguments = request.chat_template_kwargs or {}
        tools: Any = request.tools  # a list of one of the kinds of tools that a parser takes
        return self._kind(self._tokenizer, tools, chat_template_kwargs=arguments)


class VllmSampleParser:
    """A parser that fails at what the model has written costs the parsing, not the answer: the rest is content."""

    def __init__(self, parser: Parser, request: ChatCompletionRequest, prompt: list[int]) -> None:
        self._parser = parser
        self._request = request
        self._prompt = prompt
        self._broken = False

    def piece(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parsed:
        if self._broken:
            return Parsed(text)
        try:
            delta = self._parser.parse_delta(
                text, list(token_ids), self._request, prompt_token_ids=self._prompt, finished=finished
            )
        except Exception as error:  # noqa: BLE001 - logged, without its message
            _log(error)
            self._broken = True
            return Parsed(text)
        if delta is None:
            return Parsed()
        calls = (_call_part(call.index, call.id, call.function) for call in delta.tool_calls or ())
        return Parsed(delta.content or "", delta.reasoning or "", tuple(calls))

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        try:
            self._parser.set_prompt_token_ids(self._prompt)
            reasoning, content, calls = self._parser.parse(
                text, self._request, enable_auto_tools=True, model_output_token_ids=list(token_ids)
            )
        except Exception as error:  # noqa: BLE001 - logged, without its message
            _log(error)
            return Parsed(text)
        parts = (
            _call_part(index, call.id or f"call_{secrets.token_hex(12)}", call)
            for index, call in enumerate(calls or ())
        )
        return Parsed(content or "", reasoning or "", tuple(parts))


def _call_part(index: int, call_id: str | None, function: Any) -> gateway_pb2.ToolCallPart:
    """`function` is vLLM's, perhaps with one of its two fields only, or none."""
    return gateway_pb2.ToolCallPart(
        index=index,
        id=call_id or "",
        name=(function.name if function else None) or "",
        arguments=(function.arguments if function else None) or "",
    )


def _request(request: gateway_pb2.ChatRequest) -> ChatCompletionRequest:
    """What the parsers look into: the tools and their choice, the template's arguments, who has said what."""
    tools: list[dict[str, Any]] | None = None
    if request.tools and request.tool_choice != gateway_pb2.TOOL_CHOICE_NONE:
        tools = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": json.loads(tool.parameters or '{"type": "object", "properties": {}}'),
                },
            }
            for tool in request.tools
        ]
    values: ChatCompletionRequest = ChatCompletionRequest.model_validate(
        {
            "model": "",
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "tools": tools,
            "tool_choice": "auto" if tools else "none",
            "chat_template_kwargs": json.loads(request.template_arguments or "{}"),
        }
    )
    return values


def _log(error: Exception) -> None:
    """Where it failed, without its message, which may quote the answer."""
    where = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    logger.error("vLLM's parser failed: %s\n%s", type(error).__name__, where)
