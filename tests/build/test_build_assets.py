"""The draft head is the one that was measured, and an upload to a Ray cluster has it and little else."""

from __future__ import annotations

import hashlib

import pathspec

from branchline.engine.models.locate import locate_draft
from tools.lock import ROOT


def test_the_head_matches_its_checksums() -> None:
    head = locate_draft("default")
    assert head is not None
    sums = dict(reversed(line.split()) for line in (head / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in head.iterdir()} - {"README.md", "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((head / name).read_bytes()).hexdigest() == digest, name


def test_an_upload_is_small_and_complete() -> None:
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".rayignore").read_text().splitlines())
    files = {}
    for top in ROOT.iterdir():
        if not ignored.match_file(f"{top.name}/" if top.is_dir() else top.name):
            for file in top.rglob("*") if top.is_dir() else [top]:
                path = str(file.relative_to(ROOT))
                if file.is_file() and not ignored.match_file(path):
                    files[path] = file
    assert {"branchline/core.py", "cluster/__init__.py", "gateway/__init__.py"} <= files.keys()
    assert "branchline/assets/smollm2-135m-instruct-eagle3/model.safetensors" in files
    assert "deploy/ray/config.yaml" in files
    assert not any(path.startswith(("tests/", "benchmarks/", "docs/")) for path in files)
    assert ignored.match_file(".git/HEAD")
    assert ignored.match_file(".venv/bin/python")
    assert sum(file.stat().st_size for file in files.values()) < 40 * 2**20
