"""The control of a running system, over gRPC and by its commands, on a real local Ray with light roles."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cluster_helpers import HERE, nothing_left, wait_until

from branchline.config import Config, ConfigError
from branchline.v1 import control_pb2, control_pb2_grpc
from cluster import steering
from cluster.cli import main
from cluster.control import controlled
from cluster.placement import Plan
from cluster.session import local_env, local_ray
from cluster.supervisor import StartError, Supervisor

pytestmark = pytest.mark.cluster

ROLES = {"prefill": "cluster_roles:worker", "decode": "cluster_roles:worker", "gateway": "cluster_roles:gateway"}


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A system of one prefill, two decode workers and a gateway, which is ended by a command."""
    tmp_path_factory.getbasetemp()  # pytest's own files go elsewhere
    with pytest.MonkeyPatch.context() as patch, nothing_left() as directory:
        patch.setattr("tempfile.tempdir", str(directory))
        with local_ray(8, print) as session, running(local_env({"PYTHONPATH": str(HERE)}, session)) as address:
            yield address


@contextlib.contextmanager
def running(env: dict[str, str]) -> Iterator[str]:
    config = Config().override(**{"engine.threads": 1, "decode.replicas": 2})
    supervisor = Supervisor(Plan(config, serve_paths=ROLES), env, lambda _line: None)

    def supervise() -> None:
        supervisor.start(60)
        supervisor.watch(lambda: False)
        steering.finish(supervisor, supervisor.stop_grace_s or 0.0)

    thread = threading.Thread(target=supervise, name="supervisor")
    with controlled(supervisor, config) as address:
        thread.start()
        try:
            yield address
        finally:
            supervisor.ask_to_stop(0)
            thread.join(30)
            supervisor.close(5)


def command(control: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: str) -> tuple[int, str]:
        code = main([*words, "--control", control])
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture
def branchline(control: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    wait_until(lambda: status(control).state == "serving", 60, "it serves")
    return command(control, capsys)


def status(control: str) -> control_pb2.GetClusterResponse:
    with grpc.insecure_channel(control) as channel:
        return control_pb2_grpc.ControlServiceStub(channel).GetCluster(control_pb2.GetClusterRequest(), timeout=10)


def test_status_names_every_process(branchline: Callable[..., tuple[int, str]]) -> None:
    code, text = branchline("status", "--json")
    cluster = json.loads(text)
    assert code == 0
    assert [worker["id"] for worker in cluster["workers"]] == ["prefill-0", "decode-0", "decode-1", "gateway-0"]
    fields = {"id", "role", "node", "pid", "address", "state", "running", "blocks_used", "blocks_total"}
    for worker in cluster["workers"]:
        assert fields <= worker.keys()
        assert worker["state"] == "ready"
        assert worker["pid"] > 1
        assert worker["address"].startswith("127.0.0.1:")
    code, text = branchline("status")
    assert code == 0
    assert text.splitlines()[1].split()[:4] == ["ID", "STATE", "NODE", "ADDRESS"]
    assert len(text.splitlines()) == 6


def test_it_grows_and_shrinks(branchline: Callable[..., tuple[int, str]], control: str) -> None:
    assert branchline("scale", "--prefill", "2", "--decode", "1", "--grace", "5") == (
        0,
        "added: prefill-1\ndraining: decode-1\n",
    )
    assert [p.id for p in status(control).processes] == ["prefill-0", "prefill-1", "decode-0", "gateway-0"]
    assert branchline("drain", "prefill-0", "--grace", "5") == (0, "")
    # No number is given twice.
    assert branchline("scale", "--decode", "2") == (0, "added: decode-2\n")
    assert [p.id for p in status(control).processes] == ["prefill-1", "decode-0", "decode-2", "gateway-0"]


def workers(control: str) -> dict[str, int]:
    """Their revisions."""
    return {p.id: p.revision for p in status(control).processes if p.role != "gateway"}


def test_workers_are_replaced_one_after_the_other(branchline: Callable[..., tuple[int, str]], control: str) -> None:
    before = workers(control)
    code, text = branchline("update", "--set", "engine.max_batch=3", "--grace", "5")
    assert code == 0, text
    assert text.splitlines()[-1] == "done: 3 of 3 workers have revision 1"
    after = workers(control)
    assert not before.keys() & after.keys()
    assert set(after.values()) == {1}
    assert [name.partition("-")[0] for name in after] == ["prefill", "decode", "decode"]
    code, text = branchline("status")
    assert "update done: 3 of 3 workers have revision 1" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("model.draft=missing", "model.draft: missing: there is no such draft head"),
        ("transfer.streams=4", "could share no KV with prefill-"),
    ],
)
def test_an_update_that_fails_is_taken_back(
    branchline: Callable[..., tuple[int, str]], control: str, change: str, reason: str
) -> None:
    before = workers(control)
    code, text = branchline("update", "--set", change, "--grace", "5")
    assert code == 1
    assert text.splitlines()[-1].startswith("rolled back: 3 of 3 workers have revision 1")
    assert reason in text
    assert workers(control) == before


def test_a_file_says_what_changes(branchline: Callable[..., tuple[int, str]], control: str, tmp_path: Path) -> None:
    """And a wrong one changes nothing."""
    before, file = workers(control), tmp_path / "change.yaml"
    for text, message in (
        ("engine: {max_batch: many}", "engine.max_batch: must be of type int, got 'many'"),
        ("engine: {wrong: 1}", "engine.wrong: unknown field"),
        ("model: {model: /other}", "model.model: can't change while the system serves"),
        ("decode: {replicas: 4}", "decode.replicas: can't change"),
        ("gateway: {max_requests: 4}", "gateway.max_requests: can't change"),
        ("engine", "must be sections with fields"),
        ("{", "change.yaml"),
    ):
        file.write_text(text)
        code, out = branchline("update", "--config", str(file))
        assert (code, message in out) == (2, True), out
    code, out = branchline("update", "--set", "engine.max_batch")
    assert (code, "--set: must be FIELD=VALUE, got 'engine.max_batch'" in out) == (2, True), out
    assert workers(control) == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["drain", "decode-9"], 2, "decode-9: there is none of that name; there are prefill-"),
        (["drain", "gateway-0"], 2, "gateway-0: it is the only gateway that is ready; scale up first"),
        (["scale"], 2, "--prefill, --decode or --gateway is needed"),
    ],
)
def test_what_makes_no_sense_is_refused(
    branchline: Callable[..., tuple[int, str]], words: list[str], code: int, message: str
) -> None:
    found, text = branchline(*words)
    assert (found, message in text) == (code, True), text


def test_nobody_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--control", "127.0.0.1:1"]) == 3
    assert main(["status", "--control", "nowhere"]) == 2
    assert "must be HOST:PORT" in capsys.readouterr().err


def test_it_is_not_opened_to_other_machines_without_tls() -> None:
    config = Config().override(**{"control.host": "0.0.0.0"})
    with (
        pytest.raises((StartError, ConfigError), match=r"that needs security\.inside"),
        controlled(Supervisor(Plan(config), {}, print), config),
    ):
        pass


def test_stop_ends_it(branchline: Callable[..., tuple[int, str]]) -> None:
    """The last of them: the system is gone afterwards."""
    assert branchline("stop", "--grace", "1", "--wait", "0") == (0, "")
    wait_until(lambda: all(thread.name != "supervisor" for thread in threading.enumerate()), 10, "it has ended")
