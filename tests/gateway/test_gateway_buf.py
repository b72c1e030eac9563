"""buf's curl for gRPC works against a gateway unchanged: it finds the service by reflection."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import PROMPT, House, house
from scripted_workers import ScriptedDecode, ScriptedPrefill, expected_tokens

from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(120)]

BUF = Path(sys.executable).parent / "buf"


async def curl(h: House, method: str, body: dict[str, Any]) -> tuple[int, str]:
    """Exit code, and what it printed."""
    url = f"http://{h.target}/{method}"
    command = [
        str(BUF),
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "--data",
        json.dumps(body),
        url,
    ]
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}
    process = await asyncio.create_subprocess_exec(*command, **pipes)
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode()


def documents(text: str) -> list[dict[str, Any]]:
    """The JSON documents that stand behind one another."""
    decoder, found = json.JSONDecoder(), []
    while text := text.strip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


async def test_buf_curl(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill()], [ScriptedDecode()]) as h:
        service = "branchline.v1.GatewayService"
        code, out = await curl(h, f"{service}/Generate", {"tokenIds": {"ids": list(PROMPT)}, "maxTokens": "5"})
        assert code == 0, out
        ids = [token_id for response in documents(out) for token_id in response.get("tokenIds", ())]
        assert ids == expected_tokens(PROMPT, 5)
        code, out = await curl(h, f"{service}/ListModels", {})
        assert code == 0, out
        assert documents(out)[0]["models"][0]["id"] == "scripted"
        code, out = await curl(h, "grpc.health.v1.Health/Check", {"service": service})
        assert code == 0, out
        assert documents(out) == [{"status": "SERVING"}]
        code, out = await curl(h, f"{service}/Generate", {"prompt": "a", "maxTokens": "0"})
        assert code != 0
        assert "max_tokens: must be at least 1" in out
        await h.idle()
