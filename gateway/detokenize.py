"""Token ids to text, one at a time, in time linear in their number."""

from __future__ import annotations

from collections.abc import Callable

#: What stands for bytes that are no UTF-8, or not yet: the rest of the character may come with the next token.
REPLACEMENT = "\ufffd"

#: Tokens that are decoded again and again while their text ends inside a character; then the window is cut.
_LONGEST_WINDOW = 32
#: Tokens kept at a cut. A character has at most four bytes, so its tokens are among the last four.
_KEPT_AT_CUT = 8


class Detokenizer:
    """Never shows part of a character, and never takes back what it has shown.

    A token's text may depend on the one before (a leading space, a character split over tokens), so a short window
    of tokens is decoded each time, and the characters not shown yet are returned. The window moves on when its
    text ends with a whole character.
    """

    def __init__(self, decode: Callable[[list[int]], str], special_ids: frozenset[int] = frozenset()) -> None:
        """`decode` turns ids into text, with U+FFFD for bytes that are not UTF-8; `special_ids` are never shown."""
        self._decode = decode
        self._special_ids = special_ids
        self._window: list[int] = []
        self._context = 0  # leading tokens of the window that have been shown and only give context
        self._shown = 0  # characters of the window's text that have been shown

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty."""
        if token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = len(text.rstrip(REPLACEMENT))
        if settled == len(text):
            piece = text[self._shown :]
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = len(self._decode(self._window))
            return piece
        cut = len(self._window) - self._context >= _LONGEST_WINDOW
        if cut:  # that many cannot be one character: these bytes are no text, except perhaps the last ones
            settled = len(text) - 1
        piece = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        if cut:
            self._cut(unshown=len(text) - self._shown)
        return piece

    def flush(self) -> str:
        """What is still held back, at the end of the stream: an unfinished character becomes U+FFFD."""
        piece = self._decode(self._window)[self._shown :] if self._window else ""
        self._window, self._context, self._shown = [], 0, 0
        return piece

    def _cut(self, unshown: int) -> None:
        self._window = self._window[-_KEPT_AT_CUT:]
        self._context = 0
        # The window now starts anywhere, perhaps inside a character, but its text ends as before.
        self._shown = max(0, len(self._decode(self._window)) - unshown)
