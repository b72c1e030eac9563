"""The table of metrics in docs/observability.md."""

from __future__ import annotations

import re

from benchmarks.local_system import REPOSITORY

_ROW = re.compile(r"^\| `([a-z_]+)` \| (counter|gauge|histogram) \| (.*?) \|", re.MULTILINE)


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels of each metric, by its name."""
    text = (REPOSITORY / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = _ROW.findall(text)
    assert len(rows) == len({name for name, *_ in rows}) == len(re.findall(r"^\| `", text, re.MULTILINE))
    return {name: (kind, frozenset(re.findall(r"`([a-z_]+)`", labels))) for name, kind, labels in rows}
