"""The stubs are what the .proto files say, and the .proto files keep buf's rules."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.generate_stubs import ROOT, generate


def test_the_committed_stubs_are_up_to_date(tmp_path: Path) -> None:
    fresh = generate(tmp_path)
    committed = sorted((ROOT / "branchline" / "v1").glob("*_pb2*"))
    assert [path.name for path in fresh] == [path.name for path in committed]
    stale = [ours.name for ours, new in zip(committed, fresh, strict=True) if ours.read_bytes() != new.read_bytes()]
    assert not stale, "run `python -m tools.generate_stubs`"


def test_the_protos_are_lint_free() -> None:
    buf = shutil.which("buf", path=Path(sys.executable).parent)
    if buf is None:
        pytest.skip("buf-bin is not installed")
    for command in (["lint"], ["format", "--diff", "--exit-code"]):
        done = subprocess.run(
            [buf, *command], cwd=ROOT / "proto", capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
