"""Each import contract notices a breach: one module that breaks each is added to a copy, and the linter must say so."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tools.lock import ROOT, project_file

BREACHES = {
    "layers": ("gateway/breach.py", "import cluster"),
    "siblings": ("prefill_worker/breach.py", "import decode_worker"),
    "engine": ("branchline/engine/breach.py", "def later():\n    import grpc"),
    "wire": ("branchline/wire/breach.py", "import torch"),
    "client": ("branchline/client/breach.py", "import yaml"),
    "ray": ("decode_worker/breach.py", "import ray"),
    "vllm": ("branchline/engine/models/breach.py", "from vllm.config import VllmConfig"),
}


def test_every_contract_breaks_on_a_breach(tmp_path: Path) -> None:
    contracts = project_file()["tool"]["importlinter"]["contracts"]
    for package in project_file()["tool"]["importlinter"]["root_packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, text in BREACHES.values():
        (tmp_path / path).write_text(text)
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"0 kept, {len(contracts)} broken" in result.stdout
    for path, _ in BREACHES.values():
        assert path.removesuffix(".py").replace("/", ".") in result.stdout, path
