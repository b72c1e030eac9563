"""Malformed requests over HTTP: from the API's own description, and what is hardly HTTP any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter

import pytest
import schemathesis
from fuzz_http import wild_request
from http_harness import MODEL, HttpHouse, http_house
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
)

from gateway.http.openapi import document
from gateway.tokens import Tokens

pytestmark = [pytest.mark.wire, pytest.mark.timeout(3000)]

ANSWER_S = 20.0
PATIENCE_S = 0.5
AT_ONCE = 16
ERROR_FIELDS = {"message", "type", "param", "code"}
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, negative_data_rejection]


async def test_the_api_keeps_what_it_describes(tokens: Tokens, fuzz: int) -> None:
    """Bodies that fit the description and bodies that don't: no 500, errors in their shape, and what doesn't fit is
    refused.
    """
    async with http_house(tokens) as h:
        assert (await h.raw.get("/openapi.json")).json() == document()
        counts = await asyncio.to_thread(requests_from_description, str(h.raw.base_url), fuzz)
        await check_serves(h)
    show(counts)
    assert counts.total() >= fuzz / 2
    assert {200, 400} <= {status for _, status in counts}


def requests_from_description(url: str, count: int) -> Counter[tuple[str, int]]:
    """Sends so many, by path and mode in equal parts; counts the statuses."""
    api = schemathesis.openapi.from_dict(document())
    counts: Counter[tuple[str, int]] = Counter()

    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL  # else all of them end there
        response = case.call(base_url=url, timeout=ANSWER_S)
        counts[case.path, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    bounds = settings(
        max_examples=max(1, count // 4),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    for path in ("/v1/completions", "/v1/chat/completions"):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            bounds(given(case=api[path]["POST"].as_strategy(generation_mode=mode))(send))()
    return counts


async def test_what_is_hardly_http(tokens: Tokens, fuzz: int) -> None:
    """Damaged requests, lengths that lie, garbage, and clients that go away in the middle."""
    counts: Counter[tuple[str, int]] = Counter()
    numbers = iter(range(fuzz))
    async with http_house(tokens) as h:
        targets = (h.raw.base_url.netloc.decode(), h.house.target)

        async def client() -> None:
            for number in numbers:
                draw = random.Random(f"http {number}")
                data = wild_request(draw)
                port = number % 8 == 7  # the gRPC port gets its share
                answer = await exchange(targets[port], data, leave=draw.random() < 0.2)
                if port or not answer:
                    counts["grpc port" if port else "http port", 0] += 1
                    continue
                assert answer.startswith(b"HTTP/1.1 "), (number, data, answer)
                status = int(answer.split()[1])
                counts["http port", status] += 1
                assert status not in (500, 502), (number, data, answer)
                body = answer.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1 ")[0]
                if status >= 400 and (body or not data.startswith(b"HEAD")):
                    assert error_fields(body) == ERROR_FIELDS, (number, data, answer)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(client())
        await check_serves(h)
    show(counts)
    assert counts.total() == fuzz
    assert {200, 400, 404} <= {status for _, status in counts}


def error_fields(body: bytes) -> set[str] | None:
    try:
        return set(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return None


async def exchange(target: str, data: bytes, *, leave: bool) -> bytes:
    """Sends it and reads all that comes; `leave`: goes away without reading."""
    host, _, port = target.rpartition(":")
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(data)
            await writer.drain()
            if leave:
                return b""
            answer = b""
            with contextlib.suppress(TimeoutError):  # it waits for more, and may for longer than this test
                answer = await asyncio.wait_for(reader.read(2**16), PATIENCE_S)
            writer.write_eof()
            return answer + await reader.read()
        except OSError:  # it has seen enough
            return b""
        finally:
            writer.close()


async def check_serves(h: HttpHouse) -> None:
    await h.idle()
    response = await h.post("/v1/completions", prompt="a", max_tokens=2)
    assert response.status_code == 200, response.text


def show(counts: Counter[tuple[str, int]]) -> None:
    for (name, status), count in sorted(counts.items()):
        print(f"{name:<22} {status or 'closed'!s:<8} {count:>6}")
