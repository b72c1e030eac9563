"""Fingerprints: what two workers compare before they exchange KV (architecture, section 2).

A digest covers the configuration, every tensor's name, dtype and shape, and evenly spread samples of every
tensor's data; not each byte, so that a checkpoint of a hundred gigabytes takes a second. Training or
quantising changes a tensor everywhere, which samples see; a change of a few single values they may miss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from branchline.core import Fingerprint
from branchline.engine.models.checkpoint import read_config, weight_files
from branchline.engine.models.protocol import KvGeometry, ModelError
from branchline.engine.sampling import SAMPLER_VERSION

_SAMPLES = 16
_SAMPLE_BYTES = 4096
#: A safetensors header says its own length; beyond this the file is damaged.
_MAX_HEADER_BYTES = 100 * 2**20
#: Config fields that say nothing about the computation, and differ between tools that save the same model.
_INCIDENTAL = {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def fingerprint(
    model_dir: Path, draft_dir: Path | None, kv: KvGeometry, vocab_size: int, dtype: torch.dtype
) -> Fingerprint:
    """The fingerprint of a target checkpoint computed in `dtype` with KV shaped `kv`, and of its draft head."""
    config = read_config(model_dir)
    target = {
        "weights": digest(model_dir),
        "dtype": _name(dtype),
        "kv_dtype": _name(kv.dtype),
        "kv_geometry": f"{kv.num_layers} layers, {kv.num_kv_heads} KV heads of {kv.head_dim}",
        "rope": _canonical({name: config[name] for name in _ROPE_FIELDS if config.get(name) is not None}),
        "vocab_size": str(vocab_size),
        "sampler_version": SAMPLER_VERSION,
    }
    return Fingerprint(target, f"{digest(draft_dir)} {_name(dtype)}" if draft_dir is not None else "")


def digest(directory: Path) -> str:
    """Hex digest of a checkpoint. Raises ModelError when its files are missing or damaged."""
    total = hashlib.sha256()
    config = {name: value for name, value in read_config(directory).items() if name not in _INCIDENTAL}
    total.update(_canonical(config).encode())
    for path in weight_files(directory):
        try:
            with path.open("rb") as file:
                for piece in _safetensors_pieces(file) if path.suffix == ".safetensors" else _file_pieces(file):
                    total.update(piece)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: not readable: {error}") from error
    return total.hexdigest()[:32]


def _safetensors_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Names, dtypes, shapes and data samples, in the order of the names."""
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header: dict[str, Any] = json.loads(file.read(length))
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        start, end = entry["data_offsets"]
        yield _canonical({"name": name, "dtype": entry["dtype"], "shape": entry["shape"]}).encode()
        yield from _samples(file, 8 + length + start, 8 + length + end, _SAMPLES)


def _file_pieces(file: BinaryIO) -> Iterator[bytes]:
    size = file.seek(0, 2)
    yield str(size).encode()
    yield from _samples(file, 0, size, 1024)


def _samples(file: BinaryIO, start: int, end: int, count: int) -> Iterator[bytes]:
    """The range itself when it is short, else `count` evenly spread pieces, its first and last bytes among them."""
    if end - start <= count * _SAMPLE_BYTES:
        file.seek(start)
        yield file.read(end - start)
        return
    room = end - start - _SAMPLE_BYTES
    for index in range(count):
        file.seek(start + room * index // (count - 1))
        yield file.read(_SAMPLE_BYTES)


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
