"""Reading Hugging Face checkpoints: `config.json` and tensors by name, with errors that say what is wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from branchline.engine.models.protocol import ModelError

_SAFETENSORS_INDEX = "model.safetensors.index.json"
_TORCH_INDEX = "pytorch_model.bin.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`. Raises ModelError when the directory or the file is missing or unreadable."""
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory")
    return _read_json(directory / "config.json")


def read_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """The ids that end a generation: `generation_config.json` decides, as in transformers, then `config.json`."""
    generation = directory / "generation_config.json"
    configs = [_read_json(generation)] if generation.is_file() else []
    configs.append(read_config(directory))
    for config in configs:
        ids = config.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, in a fixed order: safetensors where there are any, else PyTorch's."""
    for index_name, pattern in ((_SAFETENSORS_INDEX, "*.safetensors"), (_TORCH_INDEX, "pytorch_model*.bin")):
        index = directory / index_name
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise ModelError(f"{index}: has no weight_map")
            files = [directory / name for name in sorted(set(shards.values()))]
        else:
            files = sorted(directory.glob(pattern))
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ModelError(f"{directory}: weights missing: {', '.join(missing)}")
        if files:
            return files
    raise ModelError(f"{directory}: no weights (neither *.safetensors nor pytorch_model.bin)")


class TensorSource(Protocol):
    """Where a model takes its tensors from: a checkpoint, or anything that has them by name."""

    def __contains__(self, name: str) -> bool: ...

    def take(self, name: str, shape: Iterable[int]) -> torch.Tensor:
        """The tensor `name`, which must have this shape; on any device, in any dtype."""
        ...

    def rows(self, name: str) -> int:
        """The first dimension of `name`, without taking it."""
        ...


class Weights:
    """The tensors of a checkpoint, taken one by one so that only what is in use is in memory.

    Names that were never taken are known at the end: an unexpected tensor means a computation that differs
    from ours, so it is refused instead of dropped.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        self._in_memory: dict[str, torch.Tensor] = {}
        self._taken: set[str] = set()
        for path in weight_files(directory):
            if path.suffix == ".safetensors":
                self._file_of |= dict.fromkeys(_safetensors_names(path), path)
            else:
                self._in_memory |= _load_torch(path)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of or name in self._in_memory

    def take(self, name: str, shape: Iterable[int]) -> torch.Tensor:
        """The tensor `name` on the CPU in its stored dtype. Raises ModelError when absent or of another shape."""
        self._taken.add(name)
        tensor, expected = self._read(name), list(shape)
        if list(tensor.shape) != expected:
            raise ModelError(
                f"{self.directory}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {expected}"
            )
        return tensor

    def rows(self, name: str) -> int:
        """The first dimension of `name`, without taking it. Raises ModelError when absent."""
        return self._read(name).shape[0]

    def ignore(self, *names: str) -> None:
        """Marks tensors as known and not needed."""
        self._taken.update(names)

    def check_all_taken(self) -> None:
        """Raises ModelError naming tensors that the model doesn't know."""
        unknown = sorted({*self._file_of, *self._in_memory} - self._taken)
        if unknown:
            listed = ", ".join(unknown[:4]) + (", …" if len(unknown) > 4 else "")
            raise ModelError(f"{self.directory}: tensors that this model doesn't have: {listed}")

    def names(self) -> Iterable[str]:
        return (*self._file_of, *self._in_memory)

    def _read(self, name: str) -> torch.Tensor:
        if name in self._in_memory:
            return self._in_memory[name]
        if name not in self._file_of:
            raise ModelError(f"{self.directory}: tensor {name} is missing")
        try:
            with safe_open(self._file_of[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self._file_of[name]}: {error}") from error


def _safetensors_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error


def _load_torch(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        # PyTorch's own message advises loading with code execution allowed, which is never right here.
        raise ModelError(f"{path}: not a readable PyTorch checkpoint of plain tensors") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ModelError(f"{path}: not a mapping of tensors")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent}: no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content
