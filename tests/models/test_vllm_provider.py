"""The vLLM provider against transformers and against the reference draft head. One process loads many models."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import (
    HIDDEN,
    VOCAB,
    DenseAttention,
    edit_config,
    head_config,
    head_tensors,
    in_speculators_names,
    save_head,
    save_tiny_model,
    speculators_config,
    tiny_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from branchline.config import EngineConfig
from branchline.engine.models.eagle3 import load_eagle3
from branchline.engine.models.locate import locate_draft, locate_model
from branchline.engine.models.protocol import DraftModel, KvGeometry, ModelError, TargetModel

pytest.importorskip("vllm")
pytestmark = pytest.mark.models

CPU = torch.device("cpu")
TOKENS = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(3))


def load(
    model: Path, draft: Path | None = None, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> tuple[TargetModel, DraftModel | None]:
    from branchline.engine.models.vllm_provider import load_vllm

    return load_vllm(model, draft, dtype, CPU, EngineConfig(compile=compiled))


def in_chunks(target: TargetModel, token_ids: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Logits of all tokens, computed in several forward passes over one cache."""
    attention, rows, start = DenseAttention(), [], 0
    for size in sizes:
        positions = torch.arange(start, start + size)
        rows.append(target.logits(target.forward(token_ids[positions], positions, attention).hidden))
        start += size
    assert start == len(token_ids)
    return torch.cat(rows)


def tiny(config_class: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    settings = tiny_config().to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept = {name: settings[name] for name in (*names, "vocab_size", "max_position_embeddings", "initializer_range")}
    return config_class(**kept | changes)


ARCHITECTURES = {
    "Llama": (LlamaForCausalLM, tiny_config()),
    "Qwen2": (Qwen2ForCausalLM, tiny(Qwen2Config)),
    "Qwen3": (Qwen3ForCausalLM, tiny(Qwen3Config, head_dim=16)),
    "Mistral": (MistralForCausalLM, tiny(MistralConfig, sliding_window=None)),
    "Mistral, sliding": (MistralForCausalLM, tiny(MistralConfig, sliding_window=16)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_match_transformers(tmp_path: Path, name: str) -> None:
    cls, config = ARCHITECTURES[name]
    model = save_tiny_model(tmp_path, config, cls)
    target, draft = load(tmp_path)
    assert draft is None
    expected = model(TOKENS[None]).logits[0]
    torch.testing.assert_close(in_chunks(target, TOKENS, (40,)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_chunks(target, TOKENS, (17, 1, 22)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
# An earlier model's weights are freed while fake tensors are in force, which their finaliser can't do.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_compiled_model_gives_the_same(model_dir: Path, head_dir: Path) -> None:
    """For any number of tokens, one included, and for positions that differ from the token ids."""
    target, draft = load(model_dir, head_dir)
    compiled_target, compiled_draft = load(model_dir, head_dir, compiled=True)
    for sizes in ((17, 1, 22), (40,)):
        expected, computed = in_chunks(target, TOKENS, sizes), in_chunks(compiled_target, TOKENS, sizes)
        torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)
    assert draft is not None
    assert compiled_draft is not None
    hidden = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(9))
    for rows in (12, 1):
        inputs = TOKENS[:rows], hidden[:rows], torch.arange(rows)
        expected = draft.logits(draft.forward(*inputs, DenseAttention())[0])
        computed = compiled_draft.logits(compiled_draft.forward(*inputs, DenseAttention())[0])
        torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_default_model_matches_transformers() -> None:
    directory = locate_model("default")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    target, _ = load(directory)
    assert target.spec.vocab_size == 49152
    assert target.spec.kv == KvGeometry(30, 3, 64, torch.float32)
    assert target.spec.eos_token_ids == (2,)
    tokens = torch.randint(0, 49152, (48,), generator=torch.Generator().manual_seed(4))
    expected = model(tokens[None]).logits[0]
    torch.testing.assert_close(in_chunks(target, tokens, (30, 18)), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_default_draft_head_matches_the_reference() -> None:
    """In the served dtype too: both providers must draft nearly the same."""
    directory, draft_dir = locate_model("default"), locate_draft("default", "default")
    assert draft_dir is not None
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        target, draft = load(directory, draft_dir, dtype)
        assert draft is not None
        tokens = torch.randint(0, 49152, (24,), generator=torch.Generator().manual_seed(5))
        check_draft(target, draft, draft_dir, directory, tokens, tolerance)


def check_draft(
    target: TargetModel, draft: DraftModel, draft_dir: Path, model_dir: Path, tokens: torch.Tensor, tolerance: float
) -> None:
    """One pass over verified tokens, then one over a drafted child, against `eagle3`. `tolerance` is that of the whole
    difference, relative to the whole: of thousands of entries in bfloat16 there is always one that is far off."""
    dtype = target.spec.kv.dtype
    embedding = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).get_input_embeddings().weight.data
    reference = load_eagle3(draft_dir, target.spec, embedding, CPU, dtype)
    assert draft.spec == reference.spec
    assert torch.equal(draft.target_token_ids, reference.target_token_ids)
    auxiliary = target.forward(tokens, torch.arange(len(tokens)), DenseAttention()).auxiliary
    assert auxiliary is not None
    results = []
    for head in (draft, reference):
        attention = DenseAttention()
        fused = head.fuse(auxiliary)
        normed, recurrent = head.forward(tokens, fused, torch.arange(len(tokens)), attention)
        child = torch.tensor([7, 11]), recurrent[-2:], torch.tensor([len(tokens), len(tokens)])
        results.append((fused, head.logits(normed), recurrent, head.logits(head.forward(*child, attention)[0])))
    for ours, theirs in zip(*results, strict=True):
        assert torch.dist(ours.float(), theirs.float()) <= tolerance * theirs.float().norm()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Eight layers, of which a head fuses 2, 4 and 5."""
    save_tiny_model(tmp_path / "model", tiny_config(num_hidden_layers=8))
    return tmp_path / "model"


@pytest.fixture
def head_dir(tmp_path: Path) -> Path:
    return save_head(tmp_path / "head", head_config(), head_tensors())


@torch.no_grad()
@pytest.mark.parametrize("named", [None, [1, 3, 7]])
def test_auxiliary_states_are_the_values_entering_the_layers(
    model_dir: Path, head_dir: Path, named: list[int] | None
) -> None:
    if named:
        edit_config(head_dir, eagle_config={"eagle_aux_hidden_state_layer_ids": named})
    target, _ = load(model_dir, head_dir)
    output = target.forward(TOKENS, torch.arange(len(TOKENS)), DenseAttention())
    assert output.auxiliary is not None
    states = LlamaForCausalLM.from_pretrained(model_dir)(TOKENS[None], output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer][0] for layer in named or (2, 4, 5)], dim=-1)
    torch.testing.assert_close(output.auxiliary, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("format_name", ["safeailab", "speculators"])
def test_draft_head_matches_the_reference(model_dir: Path, tmp_path: Path, format_name: str) -> None:
    config, tensors = head_config(max_position_embeddings=16), head_tensors()  # fewer positions than the target's
    if format_name == "speculators":
        config, tensors = speculators_config(), in_speculators_names(tensors)
    head_dir = save_head(tmp_path / "head", config, tensors)
    target, draft = load(model_dir, head_dir)
    assert draft is not None
    check_draft(target, draft, head_dir, model_dir, TOKENS, 1e-5)


@torch.no_grad()
def test_positions_may_repeat(model_dir: Path) -> None:
    """Two children of one node: each must come out as if it were alone."""
    target, _ = load(model_dir)

    class Siblings(DenseAttention):
        """Every token sees the prompt and itself only."""

        def attend(
            self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
        ) -> torch.Tensor:
            assert window is None
            kept = self.keys[layer], self.values[layer]
            rows = []
            for row in range(len(query)):
                self.keys[layer], self.values[layer] = kept
                rows.append(super().attend(layer, *(each[row : row + 1] for each in (query, key, value))))
            return torch.cat(rows)

    attention = Siblings()
    prompt = DenseAttention()
    target.forward(TOKENS[:10], torch.arange(10), prompt)
    attention.keys, attention.values = prompt.keys, prompt.values
    hidden = target.forward(TOKENS[10:12], torch.tensor([10, 10]), attention).hidden
    for row, token in enumerate((10, 11)):
        alone = in_chunks(target, torch.cat([TOKENS[:10], TOKENS[token : token + 1]]), (11,))[-1]
        torch.testing.assert_close(target.logits(hidden)[row], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_models_share_a_process(tmp_path: Path) -> None:
    """Two loads of different models, used by two threads at once, don't disturb each other."""
    targets, expected, got = [], [], {}
    for index, name in enumerate(("Llama", "Qwen3")):
        cls, config = ARCHITECTURES[name]
        save_tiny_model(tmp_path / str(index), config, cls)
        targets.append(load(tmp_path / str(index))[0])
        expected.append(in_chunks(targets[index], TOKENS, (40,)))

    def work(index: int) -> None:
        with torch.no_grad():
            got[index] = [in_chunks(targets[index], TOKENS, (20, 20)) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for index in range(2):
        for logits in got[index]:
            torch.testing.assert_close(logits, expected[index], rtol=1e-4, atol=1e-4)


class HostReads(TorchDispatchMode):
    """Records the operators that wait for the device and copy to the host (or whose shapes depend on values)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "item"):
            self.seen.append(str(func))
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_forward_reads_nothing_back(model_dir: Path, head_dir: Path) -> None:
    target, draft = load(model_dir, head_dir)
    assert draft is not None
    positions = torch.arange(len(TOKENS))
    with HostReads() as reads:
        output = target.forward(TOKENS, positions, DenseAttention())
        target.logits(output.hidden)
        normed, _ = draft.forward(TOKENS, draft.fuse(output.auxiliary), positions, DenseAttention())
        draft.logits(normed)
    assert reads.seen == []


def test_errors_are_clear(model_dir: Path, head_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="hidden size 16 differs"):
        load(model_dir, save_head(tmp_path / "small", head_config(hidden_size=16), head_tensors()))
    edit_config(head_dir, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3]})
    with pytest.raises(ModelError, match="fuses layers"):
        load(model_dir, head_dir)
    edit_config(model_dir, architectures=["NoSuchForCausalLM"])
    with pytest.raises(ModelError, match="NoSuchForCausalLM"):
        load(model_dir)
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(model_dir)


PROCESS = """
import os, sys, torch
def is_socket(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False
from pathlib import Path
from branchline.config import EngineConfig
from branchline.engine.models.vllm_provider import load_vllm
before = dict(os.environ)
load_vllm(Path(sys.argv[1]), Path(sys.argv[2]), torch.bfloat16, torch.device("cpu"), EngineConfig())
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
print(sum(map(is_socket, os.listdir("/proc/self/fd"))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_is_quiet_and_ends(model_dir: Path, head_dir: Path) -> None:
    """No log lines, no listening ports, no change of the environment, a clean exit."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(model_dir), str(head_dir)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
