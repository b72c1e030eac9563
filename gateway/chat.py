"""Chats: messages and tools in; content, reasoning and tool calls out. Both front ends' way to the generator."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2
from gateway.conversation import conversation
from gateway.door import Guest
from gateway.generation import Ask, Generator
from gateway.parsing import Parsed, Parsers, SampleParser

Write = Callable[[gateway_pb2.ChatResponse], Awaitable[None]]


class Chats:
    """Belongs to one event loop."""

    def __init__(self, generator: Generator, parsers: Parsers) -> None:
        self._generator = generator
        self._parsers = parsers

    def ask(self, request: gateway_pb2.ChatRequest) -> Ask:
        """Raises InvalidRequestError, naming the field, or RpcFailure before any worker is known."""
        if (field := request.options.WhichOneof("input")) is not None:
            raise InvalidRequestError(f"options.{field}: the messages are the input")
        tokens = self._generator.tokens
        chat = conversation(request, self._generator.limits, tokens.longest_token)
        if chat.tools and not tokens.knows_tools:
            raise InvalidRequestError("chat.tools: the model's chat template knows no tools")
        if chat.tools and not self._parsers.reads_tools:
            raise InvalidRequestError(
                "chat.tools: this gateway can't read the model's tool calls; its option tool_parser names a parser"
            )
        return Ask(request.options, chat, special_tokens=self._parsers.shows_special_tokens(request))

    async def run(
        self,
        guest: Guest,
        request: gateway_pb2.ChatRequest,
        write: Write,
        *,
        started: Callable[[str, Sequence[int]], Awaitable[None]],
        whole: bool = False,
    ) -> None:
        """Generates. `started` gets the request's id and the prompt's tokens before anything waits for workers. With
        `whole` each sample is one response.

        Raises RpcFailure or InvalidRequestError.
        """
        async with self._generator.open(guest) as session:
            (prompt,) = await session.read([self.ask(request)])
            await started(session.request_id, prompt)
            writer = _Writer(request, prompt, self._parsers, write, whole=whole)
            await session.run(writer.take, writer.replay)


@dataclass(slots=True)
class _SampleState:
    parser: SampleParser
    #: All of it so far, only if the text is parsed as a whole.
    text: list[str] = field(default_factory=list)
    part: gateway_pb2.GenerateResponse = field(default_factory=gateway_pb2.GenerateResponse)


class _Writer:
    """Parses what the samples write, each by itself."""

    def __init__(
        self,
        request: gateway_pb2.ChatRequest,
        prompt: Sequence[int],
        parsers: Parsers,
        write: Write,
        *,
        whole: bool,
    ) -> None:
        self._request = request
        self._prompt = prompt
        self._parsers = parsers
        self._write = write
        self._whole = whole
        self._samples: dict[int, _SampleState] = {}

    def replay(self, part: gateway_pb2.GenerateResponse) -> None:
        """Reads what the client of a resumed stream has."""
        assert not self._whole, "only streams are resumed"
        self._state(part.sample).parser.piece(part.text, part.token_ids, finished=False)

    def _state(self, sample: int) -> _SampleState:
        if sample not in self._samples:
            self._samples[sample] = _SampleState(self._parsers.for_sample(self._request, self._prompt))
        return self._samples[sample]

    async def take(self, _prompt: int, part: gateway_pb2.GenerateResponse) -> None:
        """Writes what there is to write; each sample's last response in any case."""
        state = self._state(part.sample)
        finished = part.HasField("finished")
        if not self._whole:
            parsed = state.parser.piece(part.text, part.token_ids, finished=finished)
            if parsed or part.token_ids or finished:
                await self._write(_response(part, parsed))
            return
        state.text.append(part.text)
        state.part.MergeFrom(part)
        if finished:
            parsed = state.parser.whole("".join(state.text), state.part.token_ids)
            await self._write(_response(state.part, parsed))


def _response(part: gateway_pb2.GenerateResponse, parsed: Parsed) -> gateway_pb2.ChatResponse:
    part.text = parsed.content
    return gateway_pb2.ChatResponse(part=part, reasoning=parsed.reasoning, tool_calls=parsed.tool_calls)
