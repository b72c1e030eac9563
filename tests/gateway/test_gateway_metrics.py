"""What a gateway counts of its requests, and what of a client's trace reaches the workers."""

from __future__ import annotations

import grpc
import pytest
from gateway_harness import PROMPT, House, house
from http_harness import http_house
from scripted_workers import ScriptedDecode, ScriptedPrefill

from branchline.v1 import gateway_pb2
from branchline.wire.channels import open_channel
from branchline.wire.status import RpcFailure
from gateway.tokens import Tokens

pytestmark = pytest.mark.wire

BROKEN = RpcFailure(grpc.StatusCode.UNAVAILABLE, "scripted")


def value(h: House, name: str, **labels: str) -> float:
    """Of a metric of the gateway; 0 where there is none."""
    return h.desk.registry.get_sample_value(f"branchline_gateway_{name}", labels) or 0.0


def tokens_of(h: House, *kinds: str) -> list[float]:
    return [value(h, "tokens_total", kind=kind) for kind in kinds]


async def test_tokens_and_times(tokens: Tokens) -> None:
    async with house(tokens, [ScriptedPrefill(cached=2)], [ScriptedDecode()]) as h:
        await h.complete(8)
        await h.complete_all(3, 8)
        await h.complete(1)
        assert tokens_of(h, "prompt", "cached", "generated") == [3 * len(PROMPT), 3 * 2, 33]
        assert value(h, "requests_total", interface="grpc", code="OK") == 3
        assert [value(h, f"{name}_seconds_count") for name in ("queue", "request")] == [3, 3]
        # A time to the first token for each of five samples; between tokens only where there are two.
        assert value(h, "time_to_first_token_seconds_count") == 5
        assert value(h, "time_per_output_token_seconds_count") == 4
        messages = value(h, "inter_token_seconds_count")
        assert 4 <= messages <= 28
        assert value(h, "inter_token_seconds_sum") <= value(h, "request_seconds_sum") * 3
        workers = [value(h, "workers", role=role, state="up", model="tiny") for role in ("prefill", "decode")]
        assert workers == [1, 1]


async def test_a_failure_counts_once_and_its_tokens_too(tokens: Tokens) -> None:
    decode = ScriptedDecode(repeat=2, failing=1, failure=BROKEN)
    async with house(tokens, [ScriptedPrefill()], [decode]) as h:
        answer = await h.complete(8)
        assert value(h, "failovers_total") == answer.finished.failovers == 1
        assert tokens_of(h, "prompt", "generated") == [len(PROMPT), 8]
        speculation = answer.finished.speculation
        assert tokens_of(h, "drafted", "accepted") == [speculation.drafted, speculation.accepted]
        assert [value(h, f"{name}_seconds_count") for name in ("queue", "time_to_first_token")] == [1, 1]


async def test_requests_by_how_they_ended(tokens: Tokens) -> None:
    prefill = ScriptedPrefill(failures=[BROKEN] * 9)
    async with house(tokens, [prefill], [ScriptedDecode()], max_attempts=1, max_requests=1) as h:
        for options in ({"prompt": "a", "temperature": -1.0}, {}):
            with pytest.raises(grpc.aio.AioRpcError):
                await h.answer(4, **options)
        prefill.failures.clear()
        prefill.hang = True
        hanging = h.call(4)
        await hanging.initial_metadata()
        assert value(h, "requests_running") == 1
        with pytest.raises(grpc.aio.AioRpcError):
            await h.answer(4)
        hanging.cancel()
        await h.idle(3.0)
        codes = ("INVALID_ARGUMENT", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED", "OK")
        counted = [value(h, "requests_total", interface="grpc", code=code) for code in codes]
        assert counted == [1, 1, 1, 1, 0]
        assert value(h, "requests_running") == 0


async def test_http_counts_as_http(tokens: Tokens) -> None:
    async with http_house(tokens) as h:
        await h.post("/v1/completions", prompt=list(PROMPT), max_tokens=4)
        await h.refused("/v1/completions", prompt=list(PROMPT), max_tokens=0)
        page = await h.raw.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'branchline_gateway_requests_total{code="OK",interface="http"} 1.0' in page.text


async def test_what_is_refused_or_malformed_counts(tokens: Tokens) -> None:
    async with http_house(tokens, most=5) as h:
        async with open_channel(h.house.target) as channel:
            for method in ("Generate", "Chat"):
                call = channel.unary_stream(f"/branchline.v1.GatewayService/{method}")(b"\xff" * 9, timeout=10)
                with pytest.raises(grpc.aio.AioRpcError, match="not a valid message"):
                    await call.read()
            with pytest.raises(grpc.aio.AioRpcError, match="not a valid message"):
                await channel.unary_unary("/branchline.v1.GatewayService/Tokenize")(b"\xff" * 9, timeout=10)
        assert (await h.raw.post("/v1/completions", content=b"{")).status_code == 400
        assert (await h.raw.post("/v1/chat/completions", json={"model": "other", "messages": []})).status_code == 400
        assert (await h.raw.post("/v1/completions", json={"model": "other", "prompt": "a"})).status_code == 404
        h.house.desk.door.close()
        assert (await h.post("/v1/completions", prompt="a")).status_code == 503
        with pytest.raises(grpc.aio.AioRpcError, match="stopping"):
            await h.house.answer(4)
        counted = {
            (interface, code): value(h.house, "requests_total", interface=interface, code=code)
            for interface in ("grpc", "http")
            for code in ("INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "INTERNAL", "OK")
        }
    assert {key: count for key, count in counted.items() if count} == {
        ("grpc", "INVALID_ARGUMENT"): 2,
        ("grpc", "UNAVAILABLE"): 1,
        ("http", "INVALID_ARGUMENT"): 2,
        ("http", "NOT_FOUND"): 1,
        ("http", "UNAVAILABLE"): 1,
    }


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", False),
        ("nonsense", False),
    ],
)
async def test_a_trace_goes_on_to_the_workers_without_a_collector(tokens: Tokens, sent: str, arrives: bool) -> None:
    class Listening(ScriptedPrefill):
        async def Prefill(self, request, context):  # noqa: N802
            heard.append(dict(context.invocation_metadata()).get("traceparent"))
            async for response in super().Prefill(request, context):
                yield response

    heard: list[str | None] = []
    async with house(tokens, [Listening()], [ScriptedDecode()]) as h:
        request = gateway_pb2.GenerateRequest(token_ids=gateway_pb2.TokenIds(ids=PROMPT), max_tokens=2)
        async for _ in h.stub.Generate(request, timeout=20, metadata=(("traceparent", sent),)):
            pass
    assert heard == [sent if arrives else None]
