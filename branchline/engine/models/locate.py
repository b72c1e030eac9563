"""From the name of a model to a directory: `default`, a local directory or a Hugging Face id.

Neither torch nor transformers is imported here, so that the gateway, which wants the tokenizer only, starts fast.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Callable
from pathlib import Path

from branchline.engine.models import default_model
from branchline.engine.models.errors import ModelError

DEFAULT = "default"
NONE = "none"
#: The draft head of the default model, in the package's own data.
PACKAGED_HEAD = "smollm2-135m-instruct-eagle3"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
#: What a checkpoint needs; the same weights in other frameworks' formats stay on the hub.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "pytorch_model*.bin"]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/branchline`, or `~/.cache/branchline` where that variable is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "branchline"


def locate_model(name: str, progress: Callable[[str], None] | None = None, *, cache_dir: Path | None = None) -> Path:
    """The directory of a model: config.json, weights and tokenizer.

    `default` is unpacked into `cache_dir` on first use (half a minute, checksummed, safe when several processes
    ask at once); `progress` gets a line of text for each step. A local directory is returned as it is. Anything
    else is a Hugging Face id, downloaded unless the hub's own cache has it. Raises ModelError.
    """
    report = progress or _silent
    if name == DEFAULT:
        return default_model.unpacked(cache_dir or default_cache_dir(), report)
    return _directory(name, report)


def locate_draft(name: str, model: str = DEFAULT, progress: Callable[[str], None] | None = None) -> Path | None:
    """The directory of a draft head, or None for none.

    `default` is the head that comes with Branchline if `model` is `default`, and no head for any other model.
    Raises ModelError.
    """
    if name == NONE or (name == DEFAULT and model != DEFAULT):
        return None
    if name == DEFAULT:
        return Path(str(importlib.resources.files("branchline"))) / "assets" / PACKAGED_HEAD
    return _directory(name, progress or _silent)


def _directory(name: str, report: Callable[[str], None]) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: not a model directory: it has no config.json")
        return path
    if path.exists():
        raise ModelError(f"{name}: not a directory")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such directory")
    return _from_hub(name, report)


def _from_hub(name: str, report: Callable[[str], None]) -> Path:
    # Imported here because it costs a third of a second, which the default model need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report(f"{name}: looking it up on the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name}: neither a local directory nor in the Hugging Face cache, and the hub can't be reached"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: not a local directory, and the Hugging Face hub says: {reason}") from error


def _silent(_line: str) -> None:
    pass
