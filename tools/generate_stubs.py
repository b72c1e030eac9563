"""Generates branchline/v1 from proto/: `python -m tools.generate_stubs`. Run it after every change to a .proto.

The stubs are committed, so that neither users nor builds need the compiler; tests/wire/test_protos.py fails when
they are stale.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(output: Path) -> list[Path]:
    """Writes `branchline/v1/*_pb2.py`, `.pyi` and `*_pb2_grpc.py` below `output` and returns their paths.

    Raises RuntimeError when the compiler refuses a file (it has printed why).
    """
    from grpc_tools import protoc

    sources = sorted((ROOT / "proto").rglob("*.proto"))
    (output / "branchline" / "v1").mkdir(parents=True, exist_ok=True)
    outputs = [f"--{kind}_out={output}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", *outputs, *map(str, sources)]) != 0:
        raise RuntimeError("protoc failed")
    return sorted((output / "branchline" / "v1").glob("*_pb2*"))


if __name__ == "__main__":
    for path in generate(ROOT):
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
