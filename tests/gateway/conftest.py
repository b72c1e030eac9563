from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_tokenizer import tiny_tokens

from gateway.tokens import Tokens


@pytest.fixture(scope="session")
def tokens() -> Iterator[Tokens]:
    tokens = tiny_tokens()
    yield tokens
    tokens.close()
