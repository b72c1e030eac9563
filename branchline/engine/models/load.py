"""Loads what a worker serves: finds the files, picks provider and device, takes the fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from branchline.config import EngineConfig, ModelConfig
from branchline.engine.models.checkpoint_fingerprint import fingerprint
from branchline.engine.models.eagle3 import check_fits, load_eagle3
from branchline.engine.models.eagle3_config import read_eagle3_config
from branchline.engine.models.protocol import DraftModel, ModelError, Models, TargetModel
from branchline.engine.models.reference import load_target, read_target_spec

Progress = Callable[[str], None]


def load_models(config: ModelConfig, engine: EngineConfig, progress: Progress | None = None) -> Models:
    """Loads the target and its draft head. Raises ModelError with one clear line."""
    from branchline.engine.models.locate import locate_draft, locate_model

    report = progress or _silent
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    if engine.threads > 0:
        torch.set_num_threads(engine.threads)
    model_dir = locate_model(config.model, report)
    draft_dir = locate_draft(config.draft, config.model, report)
    if config.provider == "vllm":
        try:
            from branchline.engine.models.vllm_provider import load_vllm
        except ModuleNotFoundError as error:
            raise ModelError(f"model.provider: vllm is not installed ({error}); `reference` needs none") from error
        target, draft = load_vllm(model_dir, draft_dir, dtype, device, engine, report)
    else:
        target, draft = load_reference(model_dir, draft_dir, dtype, device, engine, report)
    return Models(
        name=config.model,
        target=target,
        draft=draft,
        fingerprint=fingerprint(model_dir, draft_dir, target.spec.kv, target.spec.vocab_size, dtype),
        device=device,
        dtype=dtype,
    )


def load_reference(
    model_dir: Path,
    draft_dir: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    engine: EngineConfig,  # noqa: ARG001  the providers share one signature
    progress: Progress,
) -> tuple[TargetModel, DraftModel | None]:
    """The plain PyTorch provider. The head is checked against the target before any weights are read."""
    spec = read_target_spec(model_dir, dtype)
    if draft_dir is None:
        progress(f"loading {model_dir.name} ({dtype}) on {device}")
        return load_target(model_dir, device, dtype), None
    head = read_eagle3_config(draft_dir)
    check_fits(head, spec)
    progress(f"loading {model_dir.name} ({dtype}) on {device}")
    target = load_target(model_dir, device, dtype, head.layers_to_fuse(spec.kv.num_layers))
    progress(f"loading the draft head {draft_dir.name}")
    return target, load_eagle3(draft_dir, spec, target.embedding, device, dtype)


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises ModelError for `cuda` without any."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ModelError("model.device: cuda is asked for, but PyTorch finds no GPU")
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    return torch.device(name)


def _silent(_: str) -> None:
    pass
