"""A plan as the writer takes it: token ids that are given, and how those between them are written."""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.draft_head.chat_format import ChatFormat
from tools.draft_head.turns import Part, Plan, Speaker, Until


@dataclass(frozen=True)
class Voice:
    """How tokens are drawn: temperature 0 takes the likeliest; those below `min_p` times the likeliest's chance are
    left out."""

    temperature: float
    min_p: float = 0.0


#: User turns are varied, without the tail that leads a small model astray; passages more so.
TURN, PASSAGE = Voice(0.8, 0.05), Voice(1.0, 0.03)


@dataclass(frozen=True)
class Segment:
    """`given`, then up to `limit` tokens: ended before one of `before`, or behind one of `through`."""

    given: tuple[int, ...]
    limit: int
    voice: Voice
    before: frozenset[int]
    through: frozenset[int] = frozenset()
    #: Tokens that aren't drawn.
    banned: frozenset[int] = frozenset()
    #: Whether it is the assistant's, which ends where it repeats itself.
    answer: bool = False


@dataclass(frozen=True)
class Segmenter:
    """Compiles plans for one model. `stops` are the tokens that end an answer."""

    format: ChatFormat
    stops: frozenset[int]
    _questions: frozenset[int] = field(init=False)
    _breaks: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_questions", self.format.tokens_with("?"))
        object.__setattr__(self, "_breaks", self.format.tokens_with("\n\r"))

    def compile(self, plan: Plan, answer: Voice, max_answer: int) -> tuple[Segment, ...]:
        """Every part that the model writes, behind what is given before it; the last answer has `max_answer` tokens."""
        segments: list[Segment] = []
        given, speaker = self.format.opening, Speaker.USER
        for part in plan:
            if part.speaker is not speaker:
                given += self.format.to_answer if speaker is Speaker.USER else self.format.to_turn
                speaker = part.speaker
            given += self.format.tokens(part.given)
            if not part.tokens:
                continue
            if speaker is Speaker.ASSISTANT:
                limit = max_answer if part is plan[-1] else part.tokens
                segments.append(Segment(given, limit, answer, self.stops, answer=True))
            else:
                segments.append(self._of_user(given, part))
            given = ()
        assert not given, "a plan ends with what the model writes"
        assert all(segment.given for segment in segments), "something must be read between two parts"
        return tuple(segments)

    def _of_user(self, given: tuple[int, ...], part: Part) -> Segment:
        ends = self.stops | {self.format.to_answer[0]}
        if part.passage:  # as long as it was asked to be: the model's own user turns are short
            return Segment(given, part.tokens, PASSAGE, frozenset(), banned=ends)
        before = ends | self._breaks if part.until is Until.LINE else ends
        through = self._questions if part.until is Until.QUESTION else frozenset[int]()
        return Segment(given, part.tokens, TURN, before, through)
