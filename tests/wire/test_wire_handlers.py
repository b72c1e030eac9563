"""What a peer sees when a handler raises, is cancelled, or cannot even read the request."""

from __future__ import annotations

import asyncio
import logging
import re

import grpc
import pytest
from wire_servicers import ScriptedGateway

from branchline.core import KvPart, KvSpan
from branchline.v1 import decode_pb2, decode_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from branchline.wire.kv_codec import kv_message
from branchline.wire.server import RpcServer
from branchline.wire.status import MAX_DETAILS_CHARS, RpcFailure, describe

EXPECTED = {
    "invalid": (grpc.StatusCode.INVALID_ARGUMENT, r"max_tokens must be at least 1"),
    "busy": (grpc.StatusCode.RESOURCE_EXHAUSTED, r"no blocks"),
    "long": (grpc.StatusCode.ABORTED, rf"x{{{MAX_DETAILS_CHARS - 1}}}…"),
    "bug": (grpc.StatusCode.INTERNAL, r"internal error, request [0-9a-f]{12}"),
}


async def failure_of(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    """The status of a call that must fail; what a stream still brings before its end is dropped."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if isinstance(call, grpc.aio.UnaryUnaryCall) else drain(call))
    return caught.value.code(), caught.value.details() or ""


async def drain(call: grpc.aio.Call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("name", EXPECTED)
async def test_errors_of_a_single_response(channel: grpc.aio.Channel, name: str) -> None:
    stub = decode_pb2_grpc.DecodeServiceStub(channel)
    code, details = await failure_of(stub.Abort(decode_pb2.AbortRequest(reason=name), timeout=10))
    assert code is EXPECTED[name][0]
    assert re.fullmatch(EXPECTED[name][1], details)


@pytest.mark.parametrize("name", EXPECTED)
async def test_errors_in_the_middle_of_a_stream(channel: grpc.aio.Channel, gateway: ScriptedGateway, name: str) -> None:
    call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(gateway_pb2.GenerateRequest(prompt=name), timeout=10)
    assert (await call.read()).text == "first"
    code, details = await failure_of(call)
    assert code is EXPECTED[name][0]
    assert re.fullmatch(EXPECTED[name][1], details)
    assert gateway.closed.is_set()


async def test_a_defect_is_logged_with_its_id_and_not_told(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    stub = decode_pb2_grpc.DecodeServiceStub(channel)
    with caplog.at_level(logging.ERROR):
        _, details = await failure_of(stub.Abort(decode_pb2.AbortRequest(reason="bug"), timeout=10))
    assert "secret" not in details
    (record,) = [record for record in caplog.records if record.name == "branchline.wire.handlers"]
    assert record.request_id == details.rpartition(" ")[2]
    assert record.exc_info is not None
    assert "a secret" in str(record.exc_info[1])


async def test_a_handler_may_abort_by_itself(channel: grpc.aio.Channel) -> None:
    stub = gateway_pb2_grpc.GatewayServiceStub(channel)
    failure = await failure_of(stub.Generate(gateway_pb2.GenerateRequest(prompt="abort"), timeout=10))
    assert failure == (grpc.StatusCode.NOT_FOUND, "by the handler itself")


async def test_what_a_servicer_leaves_out_is_unimplemented(channel: grpc.aio.Channel) -> None:
    unary = decode_pb2_grpc.DecodeServiceStub(channel).Reserve(decode_pb2.ReserveRequest(), timeout=10)
    assert (await failure_of(unary))[0] is grpc.StatusCode.UNIMPLEMENTED
    stream = decode_pb2_grpc.DecodeServiceStub(channel).Attach(decode_pb2.AttachRequest(), timeout=10)
    assert (await failure_of(stream))[0] is grpc.StatusCode.UNIMPLEMENTED
    unknown = channel.unary_unary("/branchline.v1.GatewayService/NoSuchMethod")
    assert (await failure_of(unknown(b"", timeout=10)))[0] is grpc.StatusCode.UNIMPLEMENTED


MALFORMED = {
    "not UTF-8": b"\x0a\x02\xff\xfe",
    "truncated": b"\x0a\x05ab",
    "bad tag": b"\x00\x00",
    "endless number": b"\x20" + b"\xff" * 11,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
class TestMalformedBytes:
    """gRPC alone would answer UNKNOWN, with the exception's name."""

    async def test_in_a_single_request(self, channel: grpc.aio.Channel, data: bytes) -> None:
        code, details = await failure_of(channel.unary_unary("/branchline.v1.DecodeService/Abort")(data, timeout=10))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "is not a valid message" in details
        assert "/branchline.v1.DecodeService/Abort" in details

    async def test_with_a_streamed_response(self, channel: grpc.aio.Channel, data: bytes) -> None:
        call = channel.unary_stream("/branchline.v1.GatewayService/Generate")(data, timeout=10)
        assert (await failure_of(call))[0] is grpc.StatusCode.INVALID_ARGUMENT

    async def test_in_a_request_stream_after_good_ones(self, channel: grpc.aio.Channel, data: bytes) -> None:
        call = channel.stream_stream("/branchline.v1.DecodeService/Handoff")(timeout=10)
        await call.write(kv_message(0, KvSpan(KvPart.TARGET, (0, 1), (0, 1), (0, 1)), b"data").encoded)
        assert decode_pb2.HandoffResponse.FromString(await call.read()).next_index == 1
        await call.write(data)
        assert (await failure_of(call))[0] is grpc.StatusCode.INVALID_ARGUMENT

    async def test_disturbs_nobody_else(self, channel: grpc.aio.Channel, data: bytes) -> None:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        other = stub.Generate(gateway_pb2.GenerateRequest(prompt="fine"), timeout=10)
        await failure_of(channel.unary_stream("/branchline.v1.GatewayService/Generate")(data, timeout=10))
        assert [response.text async for response in other] == ["first"]


async def test_a_damaged_frame_ends_the_handoff_with_data_loss(channel: grpc.aio.Channel) -> None:
    sent = kv_message(0, KvSpan(KvPart.TARGET, (0, 1), (0, 1), (0, 1)), b"data").encoded
    request = decode_pb2.HandoffRequest.FromString(sent)
    request.kv.data = b"dada"
    call = decode_pb2_grpc.DecodeServiceStub(channel).Handoff(timeout=10)
    await call.write(request)
    assert (await failure_of(call))[0] is grpc.StatusCode.DATA_LOSS


async def test_a_message_above_the_limit_is_refused(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary("/branchline.v1.DecodeService/Abort")
    assert (await failure_of(call(bytes(8 * 1024 * 1024 + 1), timeout=10)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


class TestCancellation:
    @pytest.mark.parametrize("prompt", ["wait", "endless"])
    async def test_by_the_client_reaches_the_handler(
        self, channel: grpc.aio.Channel, server: RpcServer, gateway: ScriptedGateway, prompt: str
    ) -> None:
        """In "endless" the cancellation finds the handler suspended in its yield: it must be closed all the same."""
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(gateway_pb2.GenerateRequest(prompt=prompt), timeout=60)
        await call.read()
        assert server.running_calls == 1
        call.cancel()
        await asyncio.wait_for(gateway.closed.wait(), 5)
        await wait_until_idle(server)

    async def test_by_the_deadline_reaches_the_handler(
        self, channel: grpc.aio.Channel, server: RpcServer, gateway: ScriptedGateway
    ) -> None:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(gateway_pb2.GenerateRequest(prompt="wait"), timeout=0.3)
        code, _ = await failure_of(call)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(gateway.cancelled.wait(), 5)
        await wait_until_idle(server)

    async def test_by_a_lost_connection_reaches_the_handler(
        self, channel: grpc.aio.Channel, server: RpcServer, gateway: ScriptedGateway
    ) -> None:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        call = stub.Generate(gateway_pb2.GenerateRequest(prompt="wait"), timeout=60)
        await call.read()
        await channel.close()
        await asyncio.wait_for(gateway.cancelled.wait(), 5)
        await wait_until_idle(server)


async def wait_until_idle(server: RpcServer) -> None:
    async with asyncio.timeout(5):
        while server.running_calls:
            await asyncio.sleep(0.01)


async def test_a_failed_call_reads_well(channel: grpc.aio.Channel) -> None:
    stub = decode_pb2_grpc.DecodeServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Abort(decode_pb2.AbortRequest(reason="busy"), timeout=10)
    assert describe(caught.value) == "RESOURCE_EXHAUSTED: no blocks"
    assert str(RpcFailure(grpc.StatusCode.ABORTED, "gone")) == "ABORTED: gone"


def test_ok_is_no_failure() -> None:
    with pytest.raises(ValueError, match="OK"):
        RpcFailure(grpc.StatusCode.OK, "fine")
