"""`pip install .[client]` gives the SDK and nothing heavy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.lock import ROOT, project_file

pytestmark = pytest.mark.build

HEAVY = ("torch", "vllm", "ray", "transformers", "numpy", "yaml")


def _run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment into which `.[client]` of a copy of the sources was installed."""
    base = tmp_path_factory.mktemp("client")
    source = base / "source"
    source.mkdir()
    for package in {name.partition(".")[0] for name in project_file()["tool"]["setuptools"]["packages"]}:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _run(sys.executable, "-m", "venv", base / "venv", cwd=base)
    _run(base / "venv/bin/python", "-m", "pip", "install", f"{source}[client]", cwd=base)
    return base / "venv/bin/python"


def test_nothing_heavy_is_installed(python: Path) -> None:
    code = f"import importlib.util as u; print([name for name in {HEAVY} if u.find_spec(name)])"
    assert _run(python, "-c", code, cwd=python.parent).strip() == "[]"
    listed = _run(python, "-m", "pip", "list", "--format=freeze", cwd=python.parent)
    names = {line.partition("==")[0] for line in listed.split()} - {"pip", "setuptools"}
    assert names == {"branchline", "grpcio", "protobuf", "typing_extensions"}


def test_the_sdk_imports_quickly(python: Path) -> None:
    code = "import time; s = time.perf_counter(); import branchline.client; print(time.perf_counter() - s)"
    # Other work on the machine can only add to it: the best of several counts.
    seconds = [float(_run(python, "-c", code, cwd=python.parent)) for _ in range(10)]
    assert min(seconds) < 0.3


def test_the_packages_and_their_data_are_complete(python: Path) -> None:
    code = "import branchline.client, pathlib; print(pathlib.Path(branchline.client.__file__).parents[2])"
    site = Path(_run(python, "-c", code, cwd=python.parent).strip())
    expected = {
        path.relative_to(ROOT)
        for package in ("branchline", "cluster", "decode_worker", "gateway", "prefill_worker")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert not [path for path in sorted(expected) if not (site / path).is_file()]
    assert (python.parent / "branchline").is_file()
