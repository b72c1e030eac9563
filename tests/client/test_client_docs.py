"""docs/sdk.md: every example runs, and everything public is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import branchline.client as sdk
from branchline.client import testing
from branchline.client.testing import FakeServer

PAGE = (Path(__file__).parents[2] / "docs" / "sdk.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"(<!-- not run: [^>]*-->\n)?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
TARGET = "127.0.0.1:50051"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 9
    assert sum(bool(excuse) for excuse, _ in EXAMPLES) == 1


@pytest.mark.parametrize(("excuse", "example"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(excuse: str, example: str) -> None:
    names: dict[str, Any] = {"__name__": "example"}
    with FakeServer() as server:
        code = compile(example.replace(TARGET, server.target), "docs/sdk.md", "exec")
        if not excuse:
            exec(code, names)
            tests = [value for name, value in names.items() if name.startswith("test_")]
            for test in tests:
                test()
            assert server.requests or tests or "InvalidRequestError" in example, "it has called nothing"
            server.wait_idle()


def test_everything_public_is_named() -> None:
    shown = set(re.findall(r"`(\w+)", PAGE))
    assert set(sdk.__all__) - {"BranchlineError"} <= shown
    assert "`BranchlineError`" in PAGE
    assert set(testing.__all__) - {"Request", "Answer", "Script"} <= shown
    options = sdk.GenerateOptions.__annotations__ | sdk.ChatOptions.__annotations__
    assert set(options) <= shown
    methods = {name for name in vars(sdk.Client) if not name.startswith("_")}
    assert {name for name in methods if f"{name}(" not in PAGE and f"`{name}`" not in PAGE} <= {"close"}
