"""benchmarks/gpu/e2e.py as a user runs it: exact, on the reference provider, without Ray and vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.local_system import REPOSITORY

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]

#: Python runs it at the start of every process that finds it on its path. An import is written down as well as
#: refused: some libraries go on without what they can't import.
SITECUSTOMIZE = """
import importlib.util, os, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in ("ray", "vllm"):
            return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        with open(os.environ["REFUSED_IMPORTS"], "a") as file:
            print(module.__name__, sys.orig_argv, file=file)
        raise ImportError(module.__name__ + " was imported")

sys.meta_path.insert(0, Refused())
with open(os.environ["WATCHED_PROCESSES"], "a") as file:
    print(*sys.orig_argv, file=file)
"""


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    """An environment in which neither Ray nor vLLM can be imported."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = {"REFUSED_IMPORTS": tmp_path / "refused", "WATCHED_PROCESSES": tmp_path / "processes"}
    for path in paths.values():
        path.touch()
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(tmp_path / "path"),
        **{name: str(path) for name, path in paths.items()},
    }


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.parametrize("module", ["ray", "vllm"])
def test_the_watch_sees_imports(watched: dict[str, str], module: str) -> None:
    done = run(["-c", f"import importlib; importlib.import_module('{module}')"], watched)
    assert done.returncode == 1
    assert f"{module} was imported" in done.stderr
    assert Path(watched["REFUSED_IMPORTS"]).read_text().startswith(module)


def test_end_to_end_without_ray_and_vllm(watched: dict[str, str], tmp_path: Path) -> None:
    limits = ["--device", "cpu", "--dtype", "float32", "--limit", "2", "--max-tokens", "8", "--concurrency", "2"]
    sizes = ["--kv-cache-mib", "512", "--json", str(tmp_path / "report.json")]
    done = run(["benchmarks/gpu/e2e.py", *limits, *sizes], watched)
    assert done.returncode == 0, done.stderr
    assert Path(watched["REFUSED_IMPORTS"]).read_text() == ""
    processes = Path(watched["WATCHED_PROCESSES"]).read_text()
    assert all(f"-m {role}" in processes for role in ("prefill_worker", "decode_worker", "gateway"))

    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["prompts"] == 2
    assert report["equal_texts"] == {"1 in flight": 2, "2 in flight": 2}
    assert set(report["results"]) == {"none", "default"}
    for ways in report["results"].values():
        assert set(ways) == {"1 in flight", "2 in flight"}
        for figures in ways.values():
            assert figures["tokens"] > 2
            assert min(figures["tokens_per_second"], figures["median_ttft_ms"], figures["tpot_ms"]) > 0
    assert all(figures["acceptance_length"] == 1 for figures in report["results"]["none"].values())
    assert all(figures["acceptance_length"] > 1 for figures in report["results"]["default"].values())
    assert set(report["speedup"]) == {"1 in flight", "2 in flight"}
    assert report["versions"]["torch"]
    assert report["machine"]
