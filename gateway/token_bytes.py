"""The bytes of a token that is part of a character, as byte-level and byte-fallback tokenizers write them."""

from __future__ import annotations

import re
from typing import Any

from gateway.detokenize import REPLACEMENT

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, every other byte for a character from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


def token_bytes(tokenizer: Any, token_id: int, text: str) -> bytes | None:
    """`text` is what the token shows on its own. None when the tokenizer does not tell."""
    if REPLACEMENT not in text:
        return text.encode()
    token: str | None = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return None
    if match := _FALLBACK.fullmatch(token):
        return bytes.fromhex(match[1])
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return None
