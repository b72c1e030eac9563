"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from branchline.v1 import gateway_pb2
from gateway.desk import Desk
from gateway.door import Guest
from gateway.generation import Ask
from gateway.http.build import OMIT, as_json, build
from gateway.http.exchange import Exchange
from gateway.http.finish import finish_reason
from gateway.http.logprobs import TextLogprobs, joined
from gateway.http.options import find_model, generate_request, session_name
from gateway.http.schemas import CompletionRequest
from gateway.http.usage import UsageSum
from gateway.tokens import Tokens

#: OpenAI's, for completions.
MAX_TOKENS = 16


class CompletionEndpoint:
    """Belongs to the desk's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def handle(self, exchange: Exchange, guest: Guest, body: CompletionRequest) -> None:
        """Raises HttpError, RpcFailure or InvalidRequestError."""
        model = find_model(body.model, self._desk)
        prompts = body.prompts
        session_id = session_name(exchange.headers, body)
        asks = [Ask(_request(body, prompt, session_id)) for prompt in prompts]
        async with model.generator.open(guest, len(asks)) as session:
            exchange.request_id = session.request_id
            ids = await session.read(asks)
            echoed = [_echo(body, *pair, model.tokens) for pair in zip(prompts, ids, strict=True)]
            answer = _Answer(exchange, body, model.tokens, ids, echoed)
            await session.run(answer.take)
        await answer.end()


def _echo(body: CompletionRequest, prompt: str | list[int], ids: Sequence[int], tokens: Tokens) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else tokens.decode(list(ids))


def _request(body: CompletionRequest, prompt: str | list[int], session: str) -> gateway_pb2.GenerateRequest:
    max_tokens = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    request = generate_request(body, max_tokens, body.logprobs)
    request.session = session
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


@dataclass(slots=True)
class _Choice:
    logprobs: TextLogprobs | None
    #: Only of an answer that is written at once.
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    pieces: list[Logprobs] = field(default_factory=list)
    reason: str | None = None


class _Answer:
    """Choice `n * prompt + sample`, as OpenAI numbers them."""

    def __init__(
        self,
        exchange: Exchange,
        body: CompletionRequest,
        tokens: Tokens,
        prompts: Sequence[tuple[int, ...]],
        echoed: Sequence[str],
    ) -> None:
        self._exchange = exchange
        self._body = body
        self._n = body.n or 1
        self._prompts = prompts
        self._echoed = echoed
        self._usage = UsageSum([len(prompt) for prompt in prompts])
        self._tokens = 0
        self._head: dict[str, Any] = {
            "id": f"cmpl-{exchange.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._choices = [
            _Choice(TextLogprobs(tokens) if body.logprobs is not None else None) for _ in range(len(prompts) * self._n)
        ]
        self._begun: set[int] = set()
        options = body.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)

    async def take(self, prompt: int, part: gateway_pb2.GenerateResponse) -> None:
        index = prompt * self._n + part.sample
        choice = self._choices[index]
        text = part.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._echoed[prompt] + text
        self._tokens += len(part.token_ids)
        if part.HasField("finished"):
            self._usage.add(prompt, part.finished)
            choice.reason = finish_reason(part.finished)
        piece = choice.logprobs.take(part) if choice.logprobs and part.token_ids else None
        if self._body.stream:
            await self._send_chunk(index, text, piece, part)
            return
        choice.texts.append(text)
        choice.token_ids += part.token_ids
        if piece:
            choice.pieces.append(piece)

    async def end(self) -> None:
        if not self._body.stream:
            await self._exchange.answer(200, as_json(self._whole()).encode())
            return
        if self._usage_at_end:
            last = build(Completion, **self._head, choices=[], usage=self._usage.usage)
            await self._exchange.event(as_json(last))
        await self._exchange.end_events()

    async def _send_chunk(
        self, index: int, text: str, logprobs: Logprobs | None, part: gateway_pb2.GenerateResponse
    ) -> None:
        reason = self._choices[index].reason
        if not (text or logprobs or reason or self._usage_always or self._body.return_token_ids):
            return  # half a character
        choice = build(
            CompletionChoice,
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            token_ids=list(part.token_ids) if self._body.return_token_ids else OMIT,
        )
        usage: Any = None if self._usage_at_end else OMIT
        if self._usage_always:
            usage = self._usage.running(self._tokens)
        await self._exchange.event(as_json(build(Completion, **self._head, choices=[choice], usage=usage)))

    def _whole(self) -> Completion:
        with_ids = self._body.return_token_ids
        choices = [
            build(
                CompletionChoice,
                index=index,
                text="".join(choice.texts),
                logprobs=joined(choice.pieces) if choice.logprobs else None,
                finish_reason=choice.reason,
                token_ids=choice.token_ids if with_ids else OMIT,
                prompt_token_ids=list(self._prompts[index // self._n]) if with_ids else OMIT,
            )
            for index, choice in enumerate(self._choices)
        ]
        return build(Completion, **self._head, choices=choices, usage=self._usage.usage)
