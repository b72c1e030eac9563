"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall, ChoiceDeltaToolCallFunction
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message_function_tool_call import ChatCompletionMessageFunctionToolCall, Function

from branchline.v1 import gateway_pb2
from gateway.desk import Desk
from gateway.door import Guest
from gateway.http.build import OMIT, as_json, build
from gateway.http.exchange import Exchange
from gateway.http.finish import Reason, finish_reason
from gateway.http.logprobs import chat_logprobs
from gateway.http.messages import chat_request
from gateway.http.options import find_model, session_name
from gateway.http.schemas import ChatRequest
from gateway.http.usage import UsageSum
from gateway.tokens import Tokens

CHUNK = "chat.completion.chunk"


class ChatEndpoint:
    """Belongs to the desk's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def handle(self, exchange: Exchange, guest: Guest, body: ChatRequest) -> None:
        """Raises HttpError, RpcFailure or InvalidRequestError."""
        model = find_model(body.model, self._desk)
        answer = (_Stream if body.stream else _Whole)(exchange, body, model.tokens)

        async def started(request_id: str, prompt: Sequence[int]) -> None:
            exchange.request_id = request_id
            answer.usage = UsageSum([len(prompt)])

        request = chat_request(body)
        request.options.session = session_name(exchange.headers, body)
        await model.chats.run(guest, request, answer.take, started=started, whole=not body.stream)
        await answer.end()


class _Answer:
    """What both kinds of answer share."""

    def __init__(self, exchange: Exchange, body: ChatRequest, tokens: Tokens) -> None:
        self.exchange = exchange
        self.body = body
        self.usage = UsageSum([])
        self.calls: dict[int, set[int]] = {}  # numbers of the calls that each choice has made
        self._tokens = tokens
        self._created = int(time.time())
        self._one_call = body.parallel_tool_calls is False
        self._reasoning = body.include_reasoning is not False

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.exchange.request_id}",
            "object": kind,
            "created": self._created,
            "model": self.body.model,
        }

    def reason(self, response: gateway_pb2.ChatResponse) -> Reason | None:
        part = response.part
        if not part.HasField("finished"):
            return None
        self.usage.add(0, part.finished)
        return finish_reason(part.finished, called=bool(self.calls.get(part.sample)))

    def tool_calls(self, response: gateway_pb2.ChatResponse) -> list[gateway_pb2.ToolCallPart]:
        """Those that are told: only the first one of an answer when the client wants no parallel ones."""
        calls = [call for call in response.tool_calls if call.index == 0 or not self._one_call]
        self.calls.setdefault(response.part.sample, set()).update(call.index for call in calls)
        return calls

    def reasoning(self, response: gateway_pb2.ChatResponse) -> dict[str, str]:
        """Not in OpenAI's types; under both names that clients of vLLM look for."""
        if not response.reasoning or not self._reasoning:
            return {}
        return {"reasoning": response.reasoning, "reasoning_content": response.reasoning}

    def logprobs(self, response: gateway_pb2.ChatResponse) -> list[Any] | None:
        return chat_logprobs(self._tokens, response.part) if self.body.logprobs else None

    def token_ids(self, response: gateway_pb2.ChatResponse) -> Any:
        return list(response.part.token_ids) if self.body.return_token_ids else OMIT


class _Whole(_Answer):
    """Written at once, when all samples are whole."""

    def __init__(self, exchange: Exchange, body: ChatRequest, tokens: Tokens) -> None:
        super().__init__(exchange, body, tokens)
        self._choices: dict[int, Choice] = {}

    async def take(self, response: gateway_pb2.ChatResponse) -> None:
        """One for each sample."""
        calls = [
            build(
                ChatCompletionMessageFunctionToolCall,
                id=call.id,
                type="function",
                function=build(Function, name=call.name, arguments=call.arguments),
            )
            for call in self.tool_calls(response)
        ]
        message = build(
            ChatCompletionMessage,
            role="assistant",
            content=None if calls and not response.part.text else response.part.text,
            refusal=None,
            tool_calls=calls or OMIT,
            **self.reasoning(response),
        )
        logprobs = self.logprobs(response)
        sample = response.part.sample
        self._choices[sample] = build(
            Choice,
            index=sample,
            message=message,
            logprobs=None if logprobs is None else build(ChoiceLogprobs, content=logprobs, refusal=None),
            finish_reason=self.reason(response),
            token_ids=self.token_ids(response),
        )

    async def end(self) -> None:
        choices = [self._choices[sample] for sample in sorted(self._choices)]
        whole = build(ChatCompletion, **self.head("chat.completion"), choices=choices, usage=self.usage.usage)
        await self.exchange.answer(200, as_json(whole).encode())


class _Stream(_Answer):
    """Event by event."""

    def __init__(self, exchange: Exchange, body: ChatRequest, tokens: Tokens) -> None:
        super().__init__(exchange, body, tokens)
        options = body.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._begun: set[int] = set()
        self._completion_tokens = 0

    async def take(self, response: gateway_pb2.ChatResponse) -> None:
        sample = response.part.sample
        if sample not in self._begun:
            self._begun.add(sample)
            await self._send(sample, build(ChoiceDelta, role="assistant", content="", refusal=None))
        self._completion_tokens += len(response.part.token_ids)
        delta, logprobs, reason = self._delta(response), self.logprobs(response), self.reason(response)
        told = delta.model_fields_set or delta.model_extra or logprobs
        if told or self._usage_always or self.body.return_token_ids:
            values = build(ChunkLogprobs, content=logprobs, refusal=None) if logprobs else None
            await self._send(sample, delta, logprobs=values, token_ids=self.token_ids(response))
        if reason:
            await self._send(sample, ChoiceDelta(), reason)

    async def end(self) -> None:
        if self._usage_at_end:
            last = build(ChatCompletionChunk, **self.head(CHUNK), choices=[], usage=self.usage.usage)
            await self.exchange.event(as_json(last))
        await self.exchange.end_events()

    def _delta(self, response: gateway_pb2.ChatResponse) -> ChoiceDelta:
        return build(
            ChoiceDelta,
            content=response.part.text or OMIT,
            tool_calls=[_call_delta(call) for call in self.tool_calls(response)] or OMIT,
            **self.reasoning(response),
        )

    async def _send(
        self,
        sample: int,
        delta: ChoiceDelta,
        reason: Reason | None = None,
        *,
        logprobs: ChunkLogprobs | None = None,
        token_ids: Any = OMIT,
    ) -> None:
        choice = build(
            ChunkChoice, index=sample, delta=delta, logprobs=logprobs, finish_reason=reason, token_ids=token_ids
        )
        usage: Any = None if self._usage_at_end else OMIT
        if self._usage_always:
            usage = self.usage.running(self._completion_tokens)
        await self.exchange.event(
            as_json(build(ChatCompletionChunk, **self.head(CHUNK), choices=[choice], usage=usage))
        )


def _call_delta(call: gateway_pb2.ToolCallPart) -> ChoiceDeltaToolCall:
    function = build(ChoiceDeltaToolCallFunction, name=call.name or OMIT, arguments=call.arguments)
    kind = "function" if call.id else OMIT
    return build(ChoiceDeltaToolCall, index=call.index, id=call.id or OMIT, type=kind, function=function)
