"""What a request may have: OpenAI's fields, and those of vLLM's that mean something here.

Types are strict: "5" is no number. A field that is not listed is refused by name, as OpenAI's server does it. One that
is listed but not served must have its neutral value, and what is meant for OpenAI's own service alone (`_Ignored`) is
taken and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: What the gateway's messages can carry; what a value means, and whether it is allowed, is decided behind.
Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
MAX_PROMPTS = 128


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class _Ignored(Strict):
    """For accounting, storage and routing at OpenAI: nothing of it changes an answer. `prompt_cache_key`, else `user`,
    names the session here, for routing.
    """

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Sampling(_Ignored):
    """What both endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    n: Int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Annotated[str, Field(max_length=10)], float] | None = None
    # vLLM's
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    stop_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    return_token_ids: bool | None = None
    priority: Int | None = None
    # Branchline's
    draft_nodes: Int | None = None

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _token_ids(cls, biases: Mapping[str, float] | None) -> Any:
        for key in biases or {}:
            if not (key.isascii() and key.isdigit() and int(key) < 2**32):
                raise ValueError(f"{key!r} is no token id")
        return biases

    @model_validator(mode="after")
    def _options_of_streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self


class CompletionRequest(Sampling):
    """Of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Int | None = None
    best_of: Int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _served(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix: completions that end with a given text are not served")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: must be n, or left out: samples are not ranked")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: not with logprobs: the prompt's log-probabilities are not computed")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Strict):
    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class FunctionCall(Strict):
    name: str
    arguments: str


class MessageToolCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    """Fields that an assistant's message has in an answer are taken back as they came, whatever they are worth here."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text or part.refusal for part in self.content)
        return self.content or self.refusal or ""


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ResponseFormat(Strict):
    type: str
    json_schema: dict[str, Any] | None = None


class ChatRequest(Sampling):
    """Of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    # vLLM's
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None

    @model_validator(mode="after")
    def _served(self) -> ChatRequest:
        if self.response_format is not None and self.response_format.type != "text":
            raise ValueError("response_format: only text is served: nothing constrains the model's output")
        if self.modalities not in (None, ["text"]):
            raise ValueError("modalities: only text is served")
        if self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool):
            raise ValueError("tool_choice: only auto and none are served: nothing constrains the model's output")
        if self.tool_choice == "auto" and not self.tools:
            raise ValueError("tool_choice: only allowed with tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens: max_completion_tokens says something else")
        return self
