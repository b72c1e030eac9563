"""Unpacking the default model: really once, then damage and repair on links to what came out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from branchline.engine.models import default_model
from branchline.engine.models.errors import ModelError
from branchline.engine.models.locate import locate_model

pytestmark = pytest.mark.models

CODE = "import sys; from pathlib import Path; from branchline.engine.models.locate import locate_model\n"
CODE += "print('at', locate_model('default', print, cache_dir=Path(sys.argv[1])))"


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The directory that two processes made when they asked at once, and what each printed."""
    cache = tmp_path_factory.mktemp("cache")
    temporary = tmp_path_factory.mktemp("tmp")
    command, environment = [sys.executable, "-c", CODE, str(cache)], os.environ | {"TMPDIR": str(temporary)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=280)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    places = {line.removeprefix("at ") for output in outputs for line in output.splitlines() if line.startswith("at ")}
    assert len(places) == 1
    assert list(temporary.iterdir()) == [], "temporary files were left"
    return Path(places.pop()), outputs


@pytest.fixture
def cache(raced: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own with the unpacked model, whose conversion copies instead of computing."""

    def copied(_source: Path, target: Path, _report: Callable[[str], None]) -> None:
        shutil.copytree(raced[0], target, copy_function=os.link)
        (target / default_model.MANIFEST).unlink()

    monkeypatch.setattr(default_model, "_convert", copied)
    locate_model("default", cache_dir=tmp_path)
    return tmp_path


def test_one_converts_and_the_other_waits(raced: tuple[Path, list[str]]) -> None:
    place, outputs = raced
    assert sum("5/5 done" in output for output in outputs) == 1
    assert sum("waiting for another process" in output for output in outputs) == 1
    assert {path.name for path in place.parent.iterdir()} == {place.name, f"{place.name}.lock"}
    assert default_model.damage(place) is None


def test_the_result_is_a_model_directory(raced: tuple[Path, list[str]]) -> None:
    config = json.loads((raced[0] / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert config["dtype"] == "bfloat16"
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {p.name for p in raced[0].iterdir()}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # the file is a link to the original
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", _flip),
        ("tokenizer.json", Path.unlink),
        ("config.json", _flip),
        (default_model.MANIFEST, Path.unlink),
        (default_model.MANIFEST, _truncate),
    ],
)
def test_damage_is_seen_and_mended(cache: Path, name: str, harm: Callable[[Path], None]) -> None:
    place = locate_model("default", cache_dir=cache)
    harm(place / name)
    lines: list[str] = []
    assert locate_model("default", lines.append, cache_dir=cache) == place
    assert name in lines[0]
    assert "making it again" in lines[0]
    assert default_model.damage(place) is None
    assert {path.name for path in place.parent.iterdir()} == {place.name, f"{place.name}.lock"}


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    place = locate_model("default", cache_dir=cache)
    (place / "config.json").unlink()
    leftover = place.parent / f".{place.name}-abc"
    leftover.mkdir()
    locate_model("default", cache_dir=cache)
    assert not leftover.exists()


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bogus = tmp_path / "bogus.gguf"
    bogus.write_bytes(b"GGUF" + b"\0" * 100)
    monkeypatch.setattr(default_model, "_packaged_file", lambda: (bogus, "0"))
    with pytest.raises(ModelError, match=r"the conversion of bogus\.gguf failed"):
        locate_model("default", cache_dir=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]
