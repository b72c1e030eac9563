"""The command line: flags and configuration, and the commands against a scripted gateway over real gRPC."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster_helpers import ROOT

from branchline.config import ConfigError
from branchline.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from cluster.cli import _parser, main
from cluster.flags import config_from


class Script(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers every prompt with the same three pieces; remembers the requests."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802 - gRPC's name
        self.requests.append(request)
        if request.prompt == "bad":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt: too bad")
        if request.prompt == "full":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        if request.prompt == "slow":
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too slow")
        samples = range(request.n or 1)
        for number, text in enumerate(("Hé", "llo", "!")):
            for sample in samples:
                response = gateway_pb2.GenerateResponse(sample=sample, text=text, token_ids=[number + 10 * sample])
                if request.HasField("logprobs"):
                    response.logprobs.add(logprob=-0.5, top_token_ids=[number], top_logprobs=[-0.25])
                yield response
        for sample in reversed(samples):
            yield gateway_pb2.GenerateResponse(
                sample=sample,
                text=f" ({sample})" if sample else "",
                finished=gateway_pb2.Completion(
                    finish_reason=types_pb2.FINISH_REASON_STOP,
                    usage=gateway_pb2.Usage(prompt_tokens=4, completion_tokens=3, cached_tokens=2),
                    speculation=types_pb2.Speculation(target_forwards=1, drafted=8, accepted=1),
                    seed=7,
                ),
            )

    def GetInfo(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ARG002, N802 - gRPC's name
        worker = gateway_pb2.WorkerInfo(
            role="decode", address="10.0.0.1:5", healthy=True, blocks_total=64, blocks_used=3, requests=1, tasks=2
        )
        return gateway_pb2.GetInfoResponse(
            version="0.1.0", model="default", max_model_len=8192, tree="chain:3", workers=[worker], active_requests=1
        )


@pytest.fixture
def script() -> Iterator[tuple[Script, str]]:
    servicer = Script()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait(5)


def parse(*argv: str) -> Any:
    return _parser().parse_args(["serve", *argv])


def test_flags_override_the_file(tmp_path: Any) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {dtype: float16, tree: none}\ndecode: {replicas: 3}\nray: {address: auto}\n")
    arguments = parse(
        *("--config", str(file), "--model", "/m", "--draft", "none", "--dtype", "float32", "--provider", "reference"),
        *("--prefill", "2", "--gateways", "2", "--host", "0.0.0.0", "--grpc-port", "50051", "--http-port", "8000"),
        *("--served-model-name", "mine", "--tool-parser", "hermes", "--reasoning-parser", "qwen3"),
        *("--routing", "session_affinity"),
    )
    config = config_from(arguments, {"RAY_ADDRESS": "10.0.0.1:6379"})
    assert (config.model.model, config.model.draft, config.model.dtype) == ("/m", "none", "float32")
    assert (config.model.provider, config.model.tree) == ("reference", "none")
    assert (config.prefill.replicas, config.decode.replicas, config.gateway.replicas) == (2, 3, 2)
    assert (config.gateway.host, config.gateway.grpc_port) == ("0.0.0.0", 50051)
    assert (config.gateway.http_port, config.gateway.served_model_name) == (8000, "mine")
    assert config.gateway.routing == "session_affinity"
    assert (config.gateway.tool_parser, config.gateway.reasoning_parser) == ("hermes", "qwen3")
    assert config.ray.address == "auto"


def test_the_environment_names_the_ray_to_join() -> None:
    assert config_from(parse(), {}).ray.address == ""
    assert config_from(parse(), {"RAY_ADDRESS": "10.0.0.1:6379"}).ray.address == "10.0.0.1:6379"
    assert config_from(parse("--ray-address", "local"), {"RAY_ADDRESS": "10.0.0.1:6379"}).ray.address == "local"


def test_a_wrong_value_names_its_field() -> None:
    with pytest.raises(ConfigError, match=r"decode.replicas: must be at least 1, got 0"):
        config_from(parse("--decode", "0"), {})


@pytest.mark.parametrize(
    "file", [ROOT / "deploy/ray/config.yaml", *ROOT.glob("deploy/local/*.yaml")], ids=lambda path: path.name
)
def test_the_sample_configurations_are_valid(file: Path) -> None:
    config = config_from(parse("--config", str(file)), {})
    assert config.model.model == "default"


@pytest.mark.parametrize(
    "argv",
    [[], ["serve", "--no-such"], ["serve", "--dtype", "int3"], ["generate", "hi"], ["generate", "--target", "a:1"]],
)
def test_wrong_usage_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: No such file or directory"),
        (["--prefill", "-1"], "prefill.replicas: must be at least 1, got -1"),
        (["--model", "/nowhere"], "/nowhere: no such directory"),
    ],
)
def test_serve_refuses_in_one_line(argv: list[str], message: str) -> None:
    command = [sys.executable, "-m", "cluster.cli", "serve", "--ray-address", "local", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_generate_streams_text(script: tuple[Script, str], capsys: pytest.CaptureFixture[str]) -> None:
    servicer, target = script
    options = ["--max-tokens", "5", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "40", "--seed", "3"]
    assert main(["generate", "--target", target, "Say hello", *options, "--stop", "a", "--stop", "b"]) == 0
    assert capsys.readouterr().out == "Héllo!\n"
    (request,) = servicer.requests
    assert (request.prompt, request.max_tokens, request.temperature) == ("Say hello", 5, 0.5)
    assert (request.top_p, request.top_k, request.seed, list(request.stop)) == (0.9, 40, 3, ["a", "b"])
    assert not request.ignore_eos


def test_every_option_has_its_flag(script: tuple[Script, str]) -> None:
    servicer, target = script
    flags = [
        *("--min-p", "0.1", "--repetition-penalty", "1.5", "--presence-penalty", "0.25", "--frequency-penalty", "-0.5"),
        *("--logit-bias", "7=-1.5", "--logit-bias", "9=100", "--bad-word", "a b", "--bad-word", "c"),
        *("--min-tokens", "2", "--draft-nodes", "0", "--priority", "-3", "--session", "mine"),
    ]
    assert main(["generate", "--target", target, "Say hello", *flags, "--json", "--logprobs", "0", "--n", "2"]) == 0
    (request,) = servicer.requests
    expected = gateway_pb2.GenerateRequest(
        prompt="Say hello",
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias=[types_pb2.LogitBias(token_id=7, bias=-1.5), types_pb2.LogitBias(token_id=9, bias=100)],
        bad_words=["a b", "c"],
        min_tokens=2,
        draft_nodes=0,
        priority=-3,
        session="mine",
        logprobs=0,
        n=2,
    )
    assert request == expected


def test_chat_takes_the_options(script: tuple[Script, str], monkeypatch: pytest.MonkeyPatch) -> None:
    servicer, target = script
    typed = iter(["One", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(typed))
    assert main(["chat", "--target", target, "--min-p", "0.1", "--priority", "4", "--logit-bias", "7=1"]) == 0
    (request,) = servicer.requests
    assert (request.min_p, request.priority, request.logit_bias[0].token_id) == (0.1, 4, 7)


@pytest.mark.parametrize("bias", ["7", "x=1", "7=y", "=1", "7="])
def test_a_bias_that_is_none(capsys: pytest.CaptureFixture[str], bias: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--target", "127.0.0.1:1", "hi", "--logit-bias", bias])
    assert caught.value.code == 2
    assert "argument --logit-bias: must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logit-bias", "7=1", "--logit-bias", "7=2"], "--logit-bias: a token is named twice"),
        (["--logprobs", "2"], "--logprobs: only --json shows them"),
        (["--logit-bias=-1=2"], "logit_bias: a token id: must be between 0"),
    ],
)
def test_flags_that_contradict_are_refused(
    script: tuple[Script, str], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    servicer, target = script
    assert main(["generate", "--target", target, "hi", *flags]) == 2
    assert message in capsys.readouterr().err
    assert servicer.requests == []


def test_samples_are_printed_when_they_are_finished(
    script: tuple[Script, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--target", script[1], "--n", "2", "Say hello"]) == 0
    assert capsys.readouterr().out == "--- sample 1 ---\nHéllo! (1)\n--- sample 0 ---\nHéllo!\n"


def test_json_carries_samples_and_logprobs(script: tuple[Script, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--target", script[1], "--json", "--n", "2", "--logprobs", "1", "Say hello"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [sample["text"] for sample in answer["samples"]] == ["Héllo!", "Héllo! (1)"]
    assert answer["text"] == "Héllo!"
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "cached_tokens": 2}
    assert answer["samples"][1]["logprobs"][2] == {"logprob": -0.5, "top": [[2, -0.25]]}


def test_unset_options_stay_unset(script: tuple[Script, str]) -> None:
    servicer, target = script
    assert main(["generate", "--target", target, "Say hello", "--ignore-eos"]) == 0
    assert servicer.requests == [gateway_pb2.GenerateRequest(prompt="Say hello", ignore_eos=True)]


def test_generate_json(script: tuple[Script, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--target", script[1], "--json", "Say hello"]) == 0
    answer = json.loads(capsys.readouterr().out)
    timing = answer.pop("timing")
    sample = {
        "text": "Héllo!",
        "token_ids": [0, 1, 2],
        "finish_reason": "stop",
        "logprobs": [],
        "speculation": {"target_forwards": 1, "drafted": 8, "accepted": 1, "acceptance_length": 2.0},
        "failovers": 0,
        "preemptions": 0,
    }
    usage = {"prompt_tokens": 4, "completion_tokens": 3, "cached_tokens": 2}
    assert answer == {**sample, "usage": usage, "seed": 7, "samples": [sample]}
    assert 0 < timing["time_to_first_token_s"] <= timing["duration_s"]


def test_generate_as_chat_from_standard_input(script: tuple[Script, str], monkeypatch: pytest.MonkeyPatch) -> None:
    servicer, target = script
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grüß Gott".encode())))
    assert main(["generate", "--target", target, "--system", "Be brief", "-"]) == 0
    messages = [(message.role, message.content) for message in servicer.requests[0].chat.messages]
    assert messages == [("system", "Be brief"), ("user", "Grüß Gott")]


def test_invalid_utf8_is_refused(script: tuple[Script, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["generate", "--target", script[1], "-"]) == 2
    assert script[0].requests == []


@pytest.mark.parametrize(("prompt", "code"), [("bad", 2), ("full", 3), ("slow", 4)])
def test_exit_codes(script: tuple[Script, str], capsys: pytest.CaptureFixture[str], prompt: str, code: int) -> None:
    assert main(["generate", "--target", script[1], prompt]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--target", "127.0.0.1:1"]) == 3
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_chat_keeps_the_history(
    script: tuple[Script, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    servicer, target = script
    typed = iter(["One", "", "Two", "/reset", "Three", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(typed))
    assert main(["chat", "--target", target, "--system", "S"]) == 0
    assert capsys.readouterr().out == "Héllo!\n" * 3
    talks = [[message.content for message in request.chat.messages] for request in servicer.requests]
    assert talks == [["S", "One"], ["S", "One", "Héllo!", "Two"], ["S", "Three"]]


def test_info(script: tuple[Script, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--target", script[1]]) == 0
    head, columns, row = capsys.readouterr().out.splitlines()
    assert head == "Branchline 0.1.0, model default, up to 8192 tokens, tree chain:3, 1 active requests"
    assert columns.split() == ["ROLE", "ADDRESS", "HEALTHY", "BLOCKS", "REQUESTS", "TASKS"]
    assert row.split() == ["decode", "10.0.0.1:5", "yes", "3/64", "1", "2"]

    assert main(["info", "--target", script[1], "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["workers"][0]["blocks_used"] == 3


def test_the_asking_commands_need_the_sdk_only() -> None:
    program = "import sys, cluster.cli, cluster.ask; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())
    assert loaded.isdisjoint({"ray", "torch", "vllm", "transformers", "yaml", "rich", "psutil"})
