from __future__ import annotations

import concurrent.futures
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from branchline import client as sdk
from branchline.client import Client
from branchline.client.testing import FakeServer, Raw
from branchline.v1 import gateway_pb2, types_pb2

CODES = {
    "CANCELLED": sdk.CancelledError,
    "UNKNOWN": sdk.ServerError,
    "INVALID_ARGUMENT": sdk.InvalidRequestError,
    "DEADLINE_EXCEEDED": sdk.DeadlineExceededError,
    "NOT_FOUND": sdk.InvalidRequestError,
    "ALREADY_EXISTS": sdk.InvalidRequestError,
    "PERMISSION_DENIED": sdk.InvalidRequestError,
    "RESOURCE_EXHAUSTED": sdk.OverloadedError,
    "FAILED_PRECONDITION": sdk.InvalidRequestError,
    "ABORTED": sdk.UnavailableError,
    "OUT_OF_RANGE": sdk.InvalidRequestError,
    "UNIMPLEMENTED": sdk.UnsupportedError,
    "INTERNAL": sdk.ServerError,
    "UNAVAILABLE": sdk.UnavailableError,
    "DATA_LOSS": sdk.ServerError,
    "UNAUTHENTICATED": sdk.AuthenticationError,
}


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def test_complete_returns_everything(client: Client, server: FakeServer) -> None:
    result = client.complete(prompt="abc", max_tokens=5, seed=3)
    assert (result.text, result.token_ids, result.finish_reason) == ("abc", (97, 98, 99), "stop")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 3)
    assert result.usage.cached_tokens == 5
    assert (result.speculation.target_forwards, result.speculation.drafted, result.speculation.accepted) == (4, 20, 6)
    assert result.speculation.acceptance_length == 2.5
    assert (result.seed, result.failovers, result.preemptions) == (3, 1, 2)
    assert result.logprobs == ()
    (sample,) = result.samples
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("abc", (97, 98, 99), "stop")
    assert 0 < result.time_to_first_token_s <= result.duration_s < 10
    (request,) = server.requests
    assert (request.prompt, request.message.max_tokens, request.message.seed) == ("abc", 5, 3)


def test_a_result_is_fit_for_json(client: Client) -> None:
    values = json.loads(json.dumps(client.complete(prompt="ab").to_dict()))
    assert values["text"] == "ab"
    assert values["token_ids"] == [97, 98]
    assert values["finish_reason"] == "stop"
    assert values["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 5}
    assert values["speculation"]["acceptance_length"] == 2.5


def test_samples(client: Client, server: FakeServer) -> None:
    stream = client.generate(prompt="ab", n=3, seed=3)
    parts = [(chunk.sample, chunk.text) for chunk in stream]
    assert parts == [(0, "a"), (1, "b"), (2, "c"), (0, "b"), (1, "c"), (2, "d"), (0, ""), (1, ""), (2, "")]
    result = stream.result
    assert [sample.text for sample in result.samples] == ["ab", "bc", "cd"]
    assert [sample.token_ids for sample in result.samples] == [(97, 98), (98, 99), (99, 100)]
    assert (result.text, result.token_ids) == ("ab", (97, 98))  # sample 0's
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (2, 6)  # the prompt was computed once
    assert (result.speculation.target_forwards, result.samples[0].speculation.target_forwards) == (12, 4)
    assert (result.failovers, result.preemptions, result.seed) == (3, 6, 3)
    assert server.requests[0].message.n == 3


def test_the_result_waits_for_every_sample(client: Client, server: FakeServer) -> None:
    """Whichever is ready first; text that was held back comes with the last response, one without anything before."""
    part, done = gateway_pb2.GenerateResponse, gateway_pb2.Completion(finish_reason=types_pb2.FINISH_REASON_STOP)
    server.script = Raw(
        [part(sample=0, text="a"), part(), part(sample=1, text=".", finished=done), part(finished=done)]
    )
    stream = client.generate(prompt="a", n=2)
    reasons = []
    for chunk in stream:
        if not reasons:
            with pytest.raises(RuntimeError, match="not come to its end"):
                _ = stream.result
        if chunk.finish_reason:
            reasons.append((chunk.sample, chunk.finish_reason))
    assert reasons == [(1, "stop"), (0, "stop")]
    assert [sample.text for sample in stream.result.samples] == ["a", "."]


def test_logprobs(client: Client) -> None:
    stream = client.generate(prompt="ab", logprobs=2, n=2)
    assert [len(chunk.logprobs) for chunk in stream] == [1, 1, 1, 1, 0, 0]
    expected = tuple(
        sdk.TokenLogprobs(-position - 0.5, ((token_id, -position - 0.5), (token_id + 1, -position - 1.5)))
        for position, token_id in enumerate((97, 98))
    )
    assert stream.result.logprobs == stream.result.samples[0].logprobs == expected
    assert stream.result.samples[1].logprobs[0].top[0] == (98, -0.5)
    chosen_only = client.complete(prompt="ab", logprobs=0)
    assert chosen_only.logprobs == (sdk.TokenLogprobs(-0.5), sdk.TokenLogprobs(-1.5))
    values = json.loads(json.dumps(stream.result.to_dict()))
    assert values["logprobs"][1] == {"logprob": -1.5, "top": [[98, -1.5], [99, -2.5]]}
    assert values["samples"][1]["token_ids"] == [98, 99]
    assert values["samples"][1]["finish_reason"] == "stop"
    assert values["samples"][1]["speculation"]["acceptance_length"] == 2.5


def test_generate_streams(client: Client) -> None:
    stream = client.generate(prompt="añ")
    with pytest.raises(RuntimeError, match="not come to its end"):
        _ = stream.result
    assert [(chunk.text, chunk.token_ids) for chunk in stream] == [("a", (97,)), ("ñ", (241,)), ("", ())]
    assert stream.result.text == "añ"
    assert list(stream) == []  # as with any iterator


def test_chunks_come_before_the_end(client: Client, server: FakeServer) -> None:
    with client.generate(prompt="!wait") as stream:
        assert "".join(chunk.text for chunk in itertools.islice(stream, 4)) == "wait"
    server.wait_idle()


class TestCancellation:
    def test_leaving_the_loop(self, client: Client, server: FakeServer) -> None:
        for _ in client.generate(prompt="!wait"):
            break
        server.wait_idle()

    def test_leaving_the_block(self, client: Client, server: FakeServer) -> None:
        with client.generate(prompt="!wait") as stream:
            next(stream)
        server.wait_idle()
        with pytest.raises(sdk.CancelledError):
            list(stream)

    def test_from_another_thread(self, client: Client, server: FakeServer) -> None:
        stream = client.generate(prompt="!wait")
        threading.Timer(0.2, stream.close).start()
        with pytest.raises(sdk.CancelledError):
            list(stream)
        server.wait_idle()

    def test_closing_the_client(self, server: FakeServer) -> None:
        client = Client(server.target)
        stream = client.generate(prompt="!wait")
        next(stream)
        client.close()
        server.wait_idle()
        with pytest.raises(sdk.BranchlineError):
            list(stream)
        for call in (lambda: client.complete(prompt="x"), client.info, client.health):
            with pytest.raises(sdk.BranchlineError, match="the client is closed"):
                call()
        client.close()

    def test_closing_a_finished_stream_changes_nothing(self, client: Client) -> None:
        stream = client.generate(prompt="ab")
        list(stream)
        stream.close()
        stream.close()
        assert stream.result.text == "ab"


def test_the_deadline(client: Client, server: FakeServer) -> None:
    with pytest.raises(sdk.DeadlineExceededError) as caught:
        client.complete(prompt="!wait", timeout=0.3)
    assert isinstance(caught.value, TimeoutError)
    server.wait_idle()
    with Client(server.target, timeout=0.3) as hasty, pytest.raises(sdk.DeadlineExceededError):
        hasty.complete(prompt="!wait")
    server.wait_idle()


def test_every_code_has_an_exception() -> None:
    assert set(CODES) | {"OK"} == {code.name for code in grpc.StatusCode}


@pytest.mark.parametrize("code", CODES)
def test_a_status_becomes_its_exception(client: Client, code: str) -> None:
    with pytest.raises(sdk.BranchlineError) as caught:
        client.complete(prompt=f"!CODE {code}")
    assert type(caught.value) is CODES[code]
    assert caught.value.code == code
    assert "as the test asked" in caught.value.details
    assert code in str(caught.value)


def test_a_message_too_large_is_the_requests_fault(client: Client) -> None:
    with pytest.raises(sdk.InvalidRequestError, match="larger than max"):
        client.complete(prompt="x" * (9 * 1024 * 1024))


@pytest.mark.parametrize(
    ("message", "response"),
    [
        ("without a result", gateway_pb2.GenerateResponse(text="unfinished")),
        ("unknown finish reason 0", gateway_pb2.GenerateResponse(finished=gateway_pb2.Completion())),
        (
            "without their tokens",
            gateway_pb2.GenerateResponse(token_ids=[1], logprobs=[types_pb2.TokenLogprobs(top_logprobs=[0.0])]),
        ),
        ("sample 1, not asked for", gateway_pb2.GenerateResponse(sample=1, text="?")),
    ],
)
def test_a_server_that_breaks_the_contract(
    client: Client, server: FakeServer, message: str, response: gateway_pb2.GenerateResponse
) -> None:
    server.script = Raw([response])
    with pytest.raises(sdk.ServerError, match=message):
        client.complete(prompt="x")


def test_a_sample_that_the_server_forgets(client: Client, server: FakeServer) -> None:
    done = gateway_pb2.Completion(finish_reason=types_pb2.FINISH_REASON_STOP)
    server.script = Raw([gateway_pb2.GenerateResponse(sample=1, finished=done)])
    with pytest.raises(sdk.ServerError, match="without a result"):
        client.complete(prompt="x", n=2)


def test_a_number_of_samples_that_only_the_gateway_can_refuse(client: Client) -> None:
    with pytest.raises(sdk.InvalidRequestError):
        client.complete(prompt="!CODE INVALID_ARGUMENT", n=2**62)


def test_nobody_there() -> None:
    target = f"127.0.0.1:{free_port()}"
    with Client(target) as client:
        with pytest.raises(sdk.UnavailableError, match=target):
            client.complete(prompt="x", timeout=10)
        assert client.health(timeout=1) is False
        started = time.monotonic()
        with pytest.raises(sdk.DeadlineExceededError, match=f"{target} was not ready within 0.3 s"):
            client.wait_ready(timeout=0.3)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("target", ["", "localhost", ":5", "host:", "host:port"])
def test_a_target_is_host_and_port(target: str) -> None:
    with pytest.raises(sdk.InvalidRequestError, match="HOST:PORT"):
        Client(target)


def test_info(client: Client) -> None:
    info = client.info()
    assert (info.version, info.model, info.max_model_len, info.tree) == ("0", "fake", 4096, "none")
    assert info.active_requests == 0
    assert info.workers[1] == sdk.Worker("decode", "fake:1", True, 9, 4, 2, 3, "fake")


def test_health_and_readiness(client: Client, server: FakeServer) -> None:
    assert client.health() is True
    client.wait_ready(timeout=5)
    server.serving = False
    try:
        assert client.health() is False
        threading.Timer(0.3, setattr, [server, "serving", True]).start()
        client.wait_ready(timeout=10)
    finally:
        server.serving = True


def test_one_client_in_many_threads(client: Client) -> None:
    prompts = [f"number {number}" for number in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda prompt: client.complete(prompt=prompt), prompts))
    assert [result.text for result in results] == prompts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
