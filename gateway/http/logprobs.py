"""Log-probabilities as OpenAI writes them: with the tokens' text, bytes, and places in the answer."""

from __future__ import annotations

from collections.abc import Sequence

from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs

from branchline.v1 import gateway_pb2, types_pb2
from gateway.detokenize import Detokenizer
from gateway.tokens import Tokens

#: JSON has no infinity; OpenAI writes this for what is as good as impossible.
_LOWEST = -9999.0


class TextLogprobs:
    """Of one choice of a completion, over all of its pieces."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._detokenizer: Detokenizer = tokens.detokenizer()
        self._offset = 0  # characters before the next token

    def take(self, part: gateway_pb2.GenerateResponse) -> Logprobs:
        """Of the tokens of the next piece. A token in the middle of a character has that one's offset."""
        texts, offsets, values, tops = [], [], [], []
        for token_id, entry in zip(part.token_ids, part.logprobs, strict=True):
            text = self._tokens.piece(token_id)
            texts.append(text)
            offsets.append(self._offset)
            values.append(_finite(entry.logprob))
            tops.append(self._top(text, entry))
            self._offset += len(self._detokenizer.push(token_id))
        return Logprobs(tokens=texts, text_offset=offsets, token_logprobs=values, top_logprobs=tops)

    def _top(self, text: str, entry: types_pb2.TokenLogprobs) -> dict[str, float]:
        """The likeliest ones, and the chosen one. Of tokens with the same text the likeliest counts."""
        top: dict[str, float] = {}
        for token_id, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
            top.setdefault(self._tokens.piece(token_id), _finite(value))
        top.setdefault(text, _finite(entry.logprob))
        return top


def chat_logprobs(tokens: Tokens, part: gateway_pb2.GenerateResponse) -> list[ChatCompletionTokenLogprob]:
    """Of the tokens of a piece."""
    return [
        ChatCompletionTokenLogprob(
            token=tokens.piece(token_id),
            bytes=_bytes(tokens, token_id),
            logprob=_finite(entry.logprob),
            top_logprobs=[
                TopLogprob(token=tokens.piece(top_id), bytes=_bytes(tokens, top_id), logprob=_finite(value))
                for top_id, value in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            ],
        )
        for token_id, entry in zip(part.token_ids, part.logprobs, strict=True)
    ]


def _bytes(tokens: Tokens, token_id: int) -> list[int] | None:
    data = tokens.piece_bytes(token_id)
    return None if data is None else list(data)


def _finite(value: float) -> float:
    return max(value, _LOWEST)


def joined(pieces: Sequence[Logprobs]) -> Logprobs:
    """Of all of a choice's pieces."""
    return Logprobs(
        tokens=[text for piece in pieces for text in piece.tokens or ()],
        text_offset=[offset for piece in pieces for offset in piece.text_offset or ()],
        token_logprobs=[value for piece in pieces for value in piece.token_logprobs or ()],
        top_logprobs=[top for piece in pieces for top in piece.top_logprobs or ()],
    )
