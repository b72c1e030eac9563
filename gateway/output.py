"""From token ids to what the client reads: text in whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.core import FinishReason
from gateway.detokenize import Detokenizer
from gateway.stops import StopMatcher


@dataclass(frozen=True, slots=True)
class Piece:
    """`token_ids` are those that count, up to the one that completes a stop string; the text may lag behind."""

    token_ids: tuple[int, ...]
    text: str


class Output:
    """One request's output. After a stop string (`stopped`) nothing more comes out."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        return self._matcher.matched

    def push(self, token_ids: Sequence[int]) -> Piece:
        text: list[str] = []
        for count, token_id in enumerate(token_ids, 1):
            text.append(self._matcher.push(self._detokenizer.push(token_id)))
            if self.stopped:
                return Piece(tuple(token_ids[:count]), "".join(text))
        return Piece(tuple(token_ids), "".join(text))

    def finish(self, reason: FinishReason) -> tuple[str, FinishReason]:
        """The text that was held back, and why the output ended: the last characters may complete a stop string."""
        text = self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        return text, FinishReason.STOP if self.stopped else reason
