"""A request's input to token ids: text, a chat, or ids that are ready."""

from __future__ import annotations

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2
from gateway.conversation import Conversation, conversation
from gateway.limits import Limits, check_ids
from gateway.tokens import Tokens


async def prompt_ids(
    request: gateway_pb2.GenerateRequest, tokens: Tokens, limits: Limits, chat: Conversation | None = None
) -> tuple[int, ...]:
    """At least one id, and short enough that one more token fits. A `chat` is the input in place of the request's own,
    of which there must be none then. Raises InvalidRequestError.
    """
    field = request.WhichOneof("input")
    match field:
        case _ if chat is not None:
            assert field is None
            field, ids = "chat", await tokens.encode_chat(chat)
        case "prompt":
            ids = await text_ids(request.prompt, tokens, limits)
        case "chat":
            plain = gateway_pb2.ChatRequest(messages=request.chat.messages)
            ids = await tokens.encode_chat(conversation(plain, limits, tokens.longest_token))
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


async def text_ids(text: str, tokens: Tokens, limits: Limits) -> tuple[int, ...]:
    """None for an empty text. Refuses what must be too long even if every token were the vocabulary's longest, before
    it costs anything.
    """
    if len(text) > limits.max_model_len * tokens.longest_token:
        raise InvalidRequestError(
            f"prompt: too long: {len(text)} characters can't fit the context limit of {limits.max_model_len} tokens"
        )
    return await tokens.encode(text) if text else ()


def _check_length(field: str, length: int, limits: Limits) -> None:
    if length >= limits.max_model_len:
        raise InvalidRequestError(
            f"{field}: the prompt has {length} tokens; the context limit of {limits.max_model_len} must leave room"
            " for at least one more"
        )
