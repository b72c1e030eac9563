"""What can be said of the images without building them: the files that they copy exist, and nothing runs as root."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from chart import ROOT, render

FILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile.*"))


def instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#")))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_let_through(file: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [shlex.split(rest) for word, rest in instructions(file) if word == "COPY" and "--from" not in rest]
    sources = {source for *sources, _ in copies for source in sources}
    assert sources <= allowed
    assert all((ROOT / source).exists() for source in sources)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tools"}
    assert packages <= sources


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_two_stages_the_charts_user_and_a_health_check(file: Path) -> None:
    found = instructions(file)
    stages = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert len(stages) == 2
    assert all(":" in stage and not stage.endswith(":latest") for stage in stages)
    pod = render().pods["decode"]["spec"]["securityContext"]
    assert [rest for word, rest in found if word == "USER"] == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]
    assert [word for word, _ in found].count("HEALTHCHECK") == 1
