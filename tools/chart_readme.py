"""Writes the table of values in the Helm chart's README from the comments in its values.yaml.

    .venv/bin/python -m tools.chart_readme     (or: make chart-readme)

A comment that begins with `# --` describes the value on the line that follows it; further comment lines belong to it.
What stands above the marker in the README is written by hand and stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "deploy" / "helm" / "branchline"
MARKER = "<!-- Below this line: written by tools/chart_readme.py from values.yaml. -->\n"
INDENT = 2


def described(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each described value of a values.yaml: its path and what is said about it, in the order of the file.

    Raises ValueError for a description that no key follows.
    """
    path: list[str] = []
    words: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if content.startswith("# --"):
            words = [content.removeprefix("# --").strip()]
        elif content.startswith("#"):
            if words:
                words.append(content.removeprefix("#").strip())
        elif not content or content.startswith("- "):
            if words:
                raise ValueError(f"line {number}: a description must stand right above a key")
        else:
            depth = (len(line) - len(line.lstrip())) // INDENT
            path = [*path[:depth], content.partition(":")[0]]
            if words:
                yield tuple(path), " ".join(words)
            words = []


def undescribed(values: Any, said: set[tuple[str, ...]], path: tuple[str, ...] = ()) -> Iterator[str]:
    """The values that neither have a description nor are below one that has."""
    if path in said:
        return
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from undescribed(value, said, (*path, key))
    else:
        yield ".".join(path)


def readme() -> str:
    """The README as it should be. Raises ValueError for a value without a description."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    rows = dict(described(text))
    if missing := list(undescribed(values, set(rows))):
        raise ValueError(f"values without a description: {', '.join(missing)}")
    lines = ["| value | default | what it is |", "|---|---|---|"]
    for path, words in rows.items():
        default: Any = values
        for key in path:
            default = default[key]
        lines.append(f"| `{'.'.join(path)}` | `{json.dumps(default)}` | {words} |")
    by_hand = (CHART / "README.md").read_text(encoding="utf-8").partition(MARKER)[0]
    return by_hand + MARKER + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    (CHART / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
