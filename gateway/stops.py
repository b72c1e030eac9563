"""Stop strings, found in a stream of text whatever its chunks are."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through up to the first stop string; that one and all behind it are dropped.

    "First" is the occurrence that ends first, and of those that end together the longest: so the result does not
    depend on where the chunks end. Text that may be the beginning of a stop string is held back. Each character
    costs constant time per stop string (Knuth, Morris, Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that may be shown now. Sets `matched` when a stop string is complete."""
        if self.matched:
            return ""
        if not self._patterns:
            return text
        pending = self._held + text
        for end in range(len(self._held) + 1, len(pending) + 1):
            longest = max(pattern.feed(pending[end - 1]) for pattern in self._patterns)
            if longest:
                self.matched = True
                self._held = ""
                return pending[: end - longest]
        keep = max(pattern.progress for pattern in self._patterns)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """One stop string. `progress` is the length of its longest prefix that ends the text so far."""

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("a stop string must not be empty")
        self._text = text
        # _fallback[n]: the longest proper prefix of text[:n] that is also its suffix.
        self._fallback = [0, 0]
        for char in text[1:]:
            self._fallback.append(self._extend(self._fallback[-1], char))
        self.progress = 0

    def feed(self, char: str) -> int:
        """The stop string's length when `char` completes it, else 0."""
        self.progress = self._extend(self.progress, char)
        return self.progress if self.progress == len(self._text) else 0

    def _extend(self, length: int, char: str) -> int:
        while length and (length == len(self._text) or self._text[length] != char):
            length = self._fallback[length]
        return length + 1 if self._text[length] == char else 0
