"""API keys: a file of their hashes and limits, read again when it changes.

A key is 256 random bits, so plain SHA-256 hides it: what slow, salted hashes are for, guessing passwords out of a
dictionary, and tables made in advance, has no hold on a number that nobody can guess. And it is quick enough for every
call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from branchline.config import build
from branchline.config_base import ConfigError, require

logger = logging.getLogger(__name__)

#: What every key begins with, so that scanners for leaked secrets can know one.
PREFIX = "bl-"
#: Longer ones are not looked at.
MAX_KEY_CHARS = 256
MAX_FILE_BYTES = 4 << 20
CHECK_INTERVAL_S = 1.0

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Of one key at one gateway; 0 is no limit. A minute's worth may come at once."""

    #: Calls of any kind; a completion over HTTP counts once for each of its prompts.
    requests_per_minute: int = 0
    #: Of prompts and answers together.
    tokens_per_minute: int = 0
    #: Requests that generate at the same time.
    concurrency: int = 0

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            require(value >= 0, f"{each.name}: must not be negative, got {value}")


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of the file. `hash` is `sha256:` and 64 hexadecimal digits."""

    name: str
    hash: str
    limits: KeyLimits = field(default_factory=KeyLimits)
    #: Sees and aborts the requests of all keys, not only its own.
    operator: bool = False

    def __post_init__(self) -> None:
        require(bool(_NAME.fullmatch(self.name)), f"name: must be letters, digits and any of ._@-, got {self.name!r}")
        # The value is not repeated: it may be a key that somebody wrote here by mistake.
        require(bool(_HASH.fullmatch(self.hash)), "hash: must be sha256: and 64 hexadecimal digits")


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """As the file has it."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def entry_of(key: str, name: str, limits: KeyLimits) -> str:
    """The line of the file for a key. Raises ConfigError for a name that is none."""
    made = dataclasses.asdict(Key(name, hash_of(key), limits))
    given = {limit: value for limit, value in made["limits"].items() if value}
    entry = {"name": name, "hash": made["hash"], **({"limits": given} if given else {})}
    return "- " + yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=1000).strip()


def read_keys(path: str) -> dict[str, Key]:
    """The keys of a file, by hash. Raises ConfigError, naming the entry."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        require(len(data) <= MAX_FILE_BYTES, f"security.api_keys: {path}: larger than {MAX_FILE_BYTES} bytes")
        tree = yaml.safe_load(data)
    except OSError as error:
        raise ConfigError(f"security.api_keys: {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Its message would quote the file.
        line = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise ConfigError(f"security.api_keys: {path}: not valid YAML{line}") from None
    require(isinstance(tree, list) or tree is None, f"security.api_keys: {path}: must be a list of keys")
    keys: dict[str, Key] = {}
    names: set[str] = set()
    for number, entry in enumerate(tree or []):
        where = f"security.api_keys[{number}]"
        key = _entry(entry, where)
        require(key.name not in names, f"{where}.name: {key.name} is there twice")
        require(key.hash not in keys, f"{where}.hash: of {key.name} is there twice")
        names.add(key.name)
        keys[key.hash] = key
    return keys


def _entry(entry: Any, where: str) -> Key:
    require(isinstance(entry, Mapping) and {"name", "hash"} <= set(entry), f"{where}: must have a name and a hash")
    key: Key = build(Key, entry, where)
    return key


class Keyring:
    """The keys that are valid now. Belongs to one event loop."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError."""
        self._path = path
        self._stamp = _stamp(path)
        self._keys = read_keys(path)

    def find(self, presented: str) -> Key | None:
        """The key that a caller presents; None when it is not, or no longer, valid.

        Found by its hash: how long that takes may tell something of a hash at most, and nobody can make a key to fit a
        hash. Compared in constant time all the same.
        """
        if len(presented) > MAX_KEY_CHARS:
            return None
        digest = hash_of(presented)
        key = self._keys.get(digest)
        return key if key is not None and hmac.compare_digest(key.hash, digest) else None

    def by_hash(self, hash_: str) -> Key | None:
        """A key as the file has it now; None when it was revoked."""
        return self._keys.get(hash_)

    async def watch(self, changed: Callable[[], None]) -> None:
        """Reads the file again whenever it has changed, and calls `changed` then; until cancelled. A file that can't be
        read leaves the keys as they are; the log says so once.
        """
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                continue
            self._stamp = stamp
            try:
                # In a thread: a long file must not keep streams waiting.
                self._keys = await asyncio.to_thread(read_keys, self._path)
            except ConfigError as error:
                logger.error("the API keys stay as they were: %s", error)
                continue
            logger.info("%d API keys read from %s", len(self._keys), self._path)
            changed()


def _stamp(path: str) -> tuple[int, int, int] | None:
    """Changes when the file does; None without one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
