"""A request's input to token ids: text, a chat, or ids that are ready."""

from __future__ import annotations

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2
from gateway.limits import Limits, check_ids
from gateway.tokens import Message, Tokens


async def prompt_ids(request: gateway_pb2.GenerateRequest, tokens: Tokens, limits: Limits) -> tuple[int, ...]:
    """At least one id, and short enough that one more token fits. Raises InvalidRequestError."""
    field = request.WhichOneof("input")
    match field:
        case "prompt":
            _check_chars(field, len(request.prompt), tokens, limits)
            ids = await tokens.encode(request.prompt) if request.prompt else ()
        case "chat":
            ids = await tokens.encode_chat(_messages(request.chat, tokens, limits))
        case "token_ids":
            _check_length(field, len(request.token_ids.ids), limits)
            ids = tuple(request.token_ids.ids)
            check_ids(field, ids, tokens.vocab_size)
        case _:
            raise InvalidRequestError("input: one of prompt, chat and token_ids must be given")
    if not ids:
        raise InvalidRequestError(f"{field}: the prompt is empty")
    _check_length(field, len(ids), limits)
    return ids


def _messages(chat: gateway_pb2.ChatMessages, tokens: Tokens, limits: Limits) -> list[Message]:
    if not chat.messages:
        raise InvalidRequestError("chat.messages: at least one message must be given")
    if len(chat.messages) > limits.max_model_len:
        raise InvalidRequestError(f"chat.messages: {len(chat.messages)} are too many for the context limit")
    _check_chars("chat", sum(len(message.content) for message in chat.messages), tokens, limits)
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequestError(f"chat.messages[{index}].role: must not be empty")
    return [Message(message.role, message.content) for message in chat.messages]


def _check_chars(field: str, chars: int, tokens: Tokens, limits: Limits) -> None:
    """Refuses what must be too long even if every token were the vocabulary's longest, before it costs anything."""
    most = limits.max_model_len * tokens.longest_token
    if chars > most:
        raise InvalidRequestError(
            f"{field}: too long: {chars} characters can't fit the context limit of {limits.max_model_len} tokens"
        )


def _check_length(field: str, length: int, limits: Limits) -> None:
    if length >= limits.max_model_len:
        raise InvalidRequestError(
            f"{field}: the prompt has {length} tokens; the context limit of {limits.max_model_len} must leave room"
            " for at least one more"
        )
