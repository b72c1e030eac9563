"""What reads reasoning and tool calls out of a chat's text, and what takes the place of that where nothing does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from branchline.v1 import gateway_pb2


@dataclass(frozen=True, slots=True)
class Parsed:
    """What was found in a piece of text, or in all of it."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[gateway_pb2.ToolCallPart, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


class SampleParser(Protocol):
    """Of one sample's output; either `piece` until the end, or `whole` once."""

    def piece(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parsed:
        """What is known after the next piece of text, or the last one."""

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """Of all of the text."""


class Parsers(Protocol):
    """`reads_tools`: whether they know how the model writes tool calls."""

    reads_tools: bool

    def shows_special_tokens(self, request: gateway_pb2.ChatRequest) -> bool:
        """Whether the text must have special tokens by their names, because they delimit what is looked for."""

    def for_sample(self, request: gateway_pb2.ChatRequest, prompt: Sequence[int]) -> SampleParser: ...


class PlainText:
    """No parser: everything is content."""

    reads_tools = False

    def shows_special_tokens(self, request: gateway_pb2.ChatRequest) -> bool:  # noqa: ARG002
        return False

    def for_sample(self, request: gateway_pb2.ChatRequest, prompt: Sequence[int]) -> SampleParser:  # noqa: ARG002
        return self

    def piece(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parsed:  # noqa: ARG002
        return Parsed(text)

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:  # noqa: ARG002
        return Parsed(text)
