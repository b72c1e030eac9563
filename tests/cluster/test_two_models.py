"""Two real models on one Ray behind one gateway: each gives its own text, whatever happens to the other."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster_helpers import launched, nothing_left, wait_until
from e2e_model import TinyModel, save_served_model

from branchline.client import Client, InvalidRequestError
from cluster.cli import main

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROMPT = "a bad cab faded in a deck"
OTHER = "org/wide"
TOKENS = 300


@pytest.fixture
def models(tmp_path: Path) -> dict[str, TinyModel]:
    return {"": save_served_model(tmp_path), OTHER: save_served_model(tmp_path / "wide", intermediate_size=72)}


def test_two_models_on_one_cluster(models: dict[str, TinyModel], capsys: pytest.CaptureFixture[str]) -> None:
    other = models[OTHER]
    config = models[""].config(
        **{
            "gateway.stall_timeout_s": 10.0,
            "others": {OTHER: {"model": {"model": str(other.model), "draft": str(other.head)}}},
        }
    )
    expected = {name: model.greedy(PROMPT, TOKENS) for name, model in models.items()}
    assert expected[""] != expected[OTHER]
    with nothing_left() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        with launched(config, directory) as (process, gateway, control), Client(gateway) as client:

            def run(*words: str, code: int = 0) -> str:
                assert main([*words, "--control", control]) == code
                captured = capsys.readouterr()
                return captured.err if code else captured.out

            def workers() -> dict[str, Any]:
                return {worker["id"]: worker for worker in json.loads(run("status", "--json"))["workers"]}

            def check(name: str) -> None:
                done = client.complete(prompt=PROMPT, max_tokens=TOKENS, ignore_eos=True, model=name or None)
                assert list(done.token_ids) == expected[name]

            check("")
            check(OTHER)
            assert [model.id for model in client.models()][1] == OTHER
            with pytest.raises(InvalidRequestError, match="'third' is not served"):
                client.complete(prompt=PROMPT, model="third")
            named = {name: worker["model"] for name, worker in workers().items()}
            assert named == {"prefill-0": "", "prefill-1": OTHER, "decode-0": "", "decode-1": OTHER, "gateway-0": ""}

            assert "only decode that is ready for org/wide" in run("drain", "decode-1", code=2)
            assert "no such model" in run("scale", "--decode", "2", "--model", "third", code=2)
            run("scale", "--decode", "2", "--model", OTHER)
            assert workers()["decode-2"]["model"] == OTHER

            with ThreadPoolExecutor(4) as pool:
                running = [pool.submit(check, name) for name in (OTHER, "", OTHER, "")]
                os.kill(workers()["decode-1"]["pid"], signal.SIGKILL)
                for future in running:
                    future.result(90)
            wait_until(lambda: {w["state"] for w in workers().values()} == {"ready"}, 60, "all are back")
            check(OTHER)

            run("update", "--set", f"others.{OTHER}.model.tree=chain:2", "--grace", "5")  # of all workers, one by one
            assert {w["revision"] for name, w in workers().items() if name != "gateway-0"} == {1}
            check("")
            check(OTHER)
            run("stop", "--grace", "5")
            assert process.wait(30) == 0
