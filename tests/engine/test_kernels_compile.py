"""The kernels compile for GPUs, which the interpreter does not show: it knows no types. They are compiled as the engine
launches them, with the assembler that triton brings; no GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_helpers import Problem, Shape

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from branchline.engine import attention, triton_attention, triton_rewind  # noqa: E402

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler"),
]

#: Shared memory of a program, in bytes, by compute capability: A100 and H100.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class CompileOnLaunch:
    """Stands for a kernel: a launch compiles it for `capability` and runs nothing."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return self.launch

    def launch(self, *args: Any, **named: Any) -> None:
        names = [parameter.name for parameter in self.kernel.params]
        bound = dict(zip(names, args, strict=False)) | {name: named.pop(name) for name in names if name in named}
        assert bound.keys() == set(names)
        constants, signature, aligned = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = bound[parameter.name]
            signature[parameter.name] = "constexpr" if parameter.is_constexpr else type_of(value)
            if parameter.is_constexpr:
                constants[(index,)] = value
            elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                aligned[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, aligned)
        self.compiled.append(triton.compile(source, GPUTarget("cuda", self.capability, 32), options=named))


def type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if abs(value) < 2**31 else "i64"


@pytest.fixture(params=sorted(SHARED_MEMORY))
def launches(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, CompileOnLaunch]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    make = lambda cache, tables, *rest: triton_attention.TritonAttention(cache, tables.ids, *rest[:2])  # noqa: E731
    monkeypatch.setattr(attention, "implementation", make)
    monkeypatch.setattr(triton_attention, "multiprocessors", lambda _: 132)
    kernels = {}

    def replace(module: ModuleType, *names: str) -> None:
        for name in names:
            kernels[name] = CompileOnLaunch(getattr(module, name), request.param)
            monkeypatch.setattr(module, name, kernels[name])

    replace(triton_attention, "write_rows", "pack_ancestors", "attend_split", "combine_splits")
    replace(triton_rewind, "move_rows")
    return kernels


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (256, torch.float32)])
def test_every_kernel_compiles_and_fits(
    launches: dict[str, CompileOnLaunch], head_dim: int, dtype: torch.dtype
) -> None:
    shape = Shape(bases=(300,), nodes=33, group=4, head_dim=head_dim, dtype=dtype, block_size=16)
    problem = Problem(shape, torch.device("cpu"))
    passes = problem.attention()
    for window in (None, 100):
        passes.attend(0, problem.query, problem.key, problem.value, window=window)
    triton_rewind.move(problem.cache.storage, torch.tensor([[9, 8, 7]]), torch.tensor([[1, 2, 3]]))
    for name, kernel in launches.items():
        assert kernel.compiled, name
        for compiled in kernel.compiled:
            assert compiled.metadata.shared <= SHARED_MEMORY[kernel.capability], name


def test_the_rewind_waits_between_its_reads_and_its_writes(launches: dict[str, CompileOnLaunch]) -> None:
    storage = torch.zeros(1, 2, 1, 16, 64)
    triton_rewind.move(storage, torch.tensor([[9, 8, 7]]), torch.tensor([[1, 2, 3]]))
    (compiled,) = launches["move_rows"].compiled
    lines = [line.strip() for line in compiled.asm["ptx"].splitlines()]
    kinds = [kind for line in lines for kind in ("ld.global", "bar.sync", "st.global") if kind in line]
    barrier = kinds.index("bar.sync")
    assert "st.global" not in kinds[:barrier]
    assert "ld.global" not in kinds[barrier:]
