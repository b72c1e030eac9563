"""The default provider: vLLM 0.32 as a library of models, driven by our own loop.

vLLM gives the model zoo, weight loading, quantisation and fused layers; it gives no scheduler, no cache and no
attention kernel. Its attention layers call `EngineAttentionImpl`, which hands their rotated query, key and value to the
`Attention` of the forward pass. So every architecture that vLLM builds from its plain `Attention` layer is served,
sliding windows included; whatever else that layer would have to do (soft caps, sinks, …) is refused on loading.

This is the only module that imports vLLM. The CPU build is what it is tested with. The CUDA build selects the same
backend by name and puts the model on the current device; that path is written from vLLM's source and untested.

Loading patches global state of vLLM and PyTorch for its duration, so one load runs at a time, and no other thread
should create tensors of the default dtype meanwhile. In a process that has imported this module vLLM's own engine
(`vllm.LLM`) can't be used on a CPU, since its attention backend is replaced.
"""
# ruff: noqa: E402  the log level comes before the imports that log

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: vLLM reports on importing, and at length on loading; its warnings are about the engine that isn't used here.
logging.getLogger("vllm").setLevel(logging.ERROR)

import torch
import torch.distributed
import vllm.ir
from torch.testing._internal.distributed import fake_pg
from vllm.config import CompilationMode, CUDAGraphMode, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.logging import LoggingConfig
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention as AttentionLayer
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from branchline.config import EngineConfig
from branchline.engine.models.checkpoint import read_config, read_eos_token_ids, weight_files
from branchline.engine.models.eagle3_config import NUM_AUXILIARY
from branchline.engine.models.protocol import (
    Attention,
    DraftModel,
    DraftSpec,
    KvGeometry,
    ModelError,
    TargetModel,
    TargetOutput,
    TargetSpec,
)
from branchline.engine.tree_spec import MAX_NODES

#: vLLM keeps the current configuration and the current forward context in module globals, and its products on the CPU
#: share scratch memory: one thread at a time.
_LOADING = threading.Lock()
_FORWARD = threading.Lock()

#: What vLLM raises for a checkpoint or a configuration that it can't load (pydantic's ValidationError is a ValueError).
_LOAD_ERRORS = (ValueError, RuntimeError, OSError, KeyError, AttributeError, AssertionError, TypeError, ImportError)


class EngineAttentionImpl(AttentionImpl[Any]):
    """One layer's attention: forwards to the `Attention` that the forward context carries as metadata."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        #: Position among the model's attention layers; set when all are known.
        self.layer = -1
        self.window = sliding_window
        refused = {
            f"a softmax scale of {scale}": abs(scale * head_size**0.5 - 1.0) > 1e-4,
            "ALiBi": alibi_slopes is not None,
            "a soft cap on attention logits": bool(logits_soft_cap),
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "layers that share KV": kv_sharing_target_layer_name is not None,
            f"a KV cache of dtype {kv_cache_dtype}": kv_cache_dtype.startswith(("fp8", "int", "nvfp4")),
        } | {name: value is not None for name, value in others.items()}
        for feature, present in refused.items():
            if present:
                raise ModelError(f"the model's attention asks for {feature}, which is not supported")

    def forward(
        self,
        layer: Any,  # noqa: ARG002  (vLLM's signature)
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # noqa: ARG002
        attn_metadata: Attention,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert output_scale is None, "fused output quantisation was not offered"
        assert output_block_scale is None, "fused output quantisation was not offered"
        return output.copy_(attn_metadata.attend(self.layer, query, key, value, window=self.window))


@register_backend(AttentionBackendEnum.CPU_ATTN)  # the CPU platform takes this entry whatever is asked for
@register_backend(AttentionBackendEnum.CUSTOM)
class EngineAttentionBackend(AttentionBackend):
    """vLLM's name for our attention. The cache is written inside `attend`, so vLLM's own update is skipped."""

    supported_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012  (vLLM's declaration)
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> type[EngineAttentionImpl]:
        return EngineAttentionImpl

    @staticmethod
    def get_builder_cls() -> Any:
        raise NotImplementedError("metadata is built by the engine, not by vLLM")

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


@dataclass(frozen=True)
class _Module:
    """A vLLM model with the names of its attention layers, in layer order."""

    model: Any
    config: VllmConfig
    layer_names: Sequence[str]

    @contextmanager
    def bound(self, attention: Attention, tokens: int) -> Iterator[None]:
        """Binds `attention` to the layers. vLLM's context is global: forwards of several threads take turns."""
        metadata = dict.fromkeys(self.layer_names, attention)
        with _FORWARD, set_forward_context(metadata, self.config, num_tokens=tokens):
            yield

    def kv_geometry(self, dtype: torch.dtype) -> KvGeometry:
        """Numbers the layers as `Attention.attend` sees them. Raises ModelError when their shapes differ."""
        registered = self.config.compilation_config.static_forward_context
        shapes = set()
        for index, name in enumerate(self.layer_names):
            layer = registered[name]
            if not (isinstance(layer, AttentionLayer) and isinstance(layer.impl, EngineAttentionImpl)):
                raise ModelError(f"layers of type {type(layer).__name__} are not supported, only plain attention")
            layer.impl.layer = index
            shapes.add((layer.num_kv_heads, layer.head_size, layer.head_size_v))
        if len(shapes) != 1:
            raise ModelError(f"all layers must have one KV shape, this model has {len(shapes)}")
        num_kv_heads, head_dim, value_dim = shapes.pop()
        if head_dim != value_dim:
            raise ModelError(f"keys of {head_dim} and values of {value_dim} dimensions are not supported")
        return KvGeometry(len(self.layer_names), num_kv_heads, head_dim, dtype)


class VllmTarget:
    """A TargetModel: any causal language model of vLLM's zoo."""

    def __init__(self, module: _Module, spec: TargetSpec, auxiliary: bool) -> None:
        self._module = module
        self._auxiliary = auxiliary
        self.spec = spec

    @torch.no_grad()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> TargetOutput:
        """See TargetModel.forward. Reads nothing back from the device."""
        with self._module.bound(attention, len(token_ids)):
            output = self._module.model(token_ids, positions)
        if not self._auxiliary:
            return TargetOutput(output, None)
        hidden, auxiliary = output
        return TargetOutput(hidden, torch.cat(auxiliary, dim=-1))

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden_size]` -> `[tokens, vocab_size]`."""
        with _FORWARD:
            logits: torch.Tensor = self._module.model.compute_logits(hidden)
        return logits


class VllmDraft:
    """A DraftModel: an EAGLE-3 head in vLLM's drafter class."""

    def __init__(self, module: _Module, spec: DraftSpec, target_token_ids: torch.Tensor) -> None:
        self._module = module
        self.spec = spec
        self.target_token_ids = target_token_ids

    @torch.no_grad()
    def fuse(self, auxiliary: torch.Tensor) -> torch.Tensor:
        """`[tokens, 3 * hidden_size]` -> `[tokens, hidden_size]`."""
        with _FORWARD:
            fused: torch.Tensor = self._module.model.combine_hidden_states(auxiliary)
        return fused

    @torch.no_grad()
    def forward(
        self, token_ids: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See DraftModel.forward."""
        with self._module.bound(attention, len(token_ids)):
            normed, recurrent = self._module.model(token_ids, positions, hidden)
        return normed, recurrent

    @torch.no_grad()
    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden_size]` -> `[tokens, draft_vocab_size]`; vLLM's `compute_logits` would widen them."""
        model = self._module.model
        with _FORWARD:
            logits: torch.Tensor = model.logits_processor(model.lm_head, normed)
        return logits


def load_vllm(
    model_dir: Path,
    draft_dir: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    engine: EngineConfig,
    progress: Callable[[str], None] | None = None,
) -> tuple[TargetModel, DraftModel | None]:
    """Loads a target and, unless `draft_dir` is None, its EAGLE-3 head, onto `device`.

    Repeated loads in one process are independent. Raises ModelError for missing or wrong weights, an architecture that
    vLLM or our attention doesn't know, and a device that this vLLM build doesn't drive.
    """
    say = progress or (lambda _: None)
    if current_platform.device_type != device.type:
        raise ModelError(f"this build of vLLM runs on {current_platform.device_type}, not on {device.type}")
    for directory in filter(None, (model_dir, draft_dir)):
        read_config(directory)
        weight_files(directory)
    with _LOADING, _load_errors(model_dir):
        config = _vllm_config(model_dir, draft_dir, dtype, engine)
        with set_current_vllm_config(config), _worker_state(config, device):
            say(f"loading {model_dir.name} with vLLM")
            target = _load_target(config, model_dir, dtype, draft_dir is not None)
            draft = None
            if draft_dir is not None:
                say(f"loading draft head {draft_dir.name}")
                draft = _load_draft(config, target, dtype, device)
            if engine.compile:
                say("compiling the model: a minute or two, less when it was compiled before")
                _compile(target, draft, device)
            return target, draft


class _NoAttention:
    """Takes the place of a forward pass's `Attention` where only the rest matters."""

    def attend(
        self,
        layer: int,  # noqa: ARG002  (the protocol's signature)
        query: torch.Tensor,
        key: torch.Tensor,  # noqa: ARG002
        value: torch.Tensor,  # noqa: ARG002
        *,
        window: int | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        return torch.zeros_like(query)


def _compile(target: VllmTarget, draft: VllmDraft | None, device: torch.device) -> None:
    """vLLM compiles at the first pass, and takes what is special about that pass for a rule: its number of tokens must
    not be one, and token ids and positions not the same tensor."""
    token_ids, positions = torch.arange(8, device=device), torch.arange(8, device=device)
    output = target.forward(token_ids, positions, _NoAttention())
    if draft is not None:
        assert output.auxiliary is not None
        draft.forward(token_ids, draft.fuse(output.auxiliary), positions, _NoAttention())


def _vllm_config(model_dir: Path, draft_dir: Path | None, dtype: torch.dtype, engine: EngineConfig) -> VllmConfig:
    speculative: dict[str, Any] | None = None
    if draft_dir is not None:
        speculative = {"method": "eagle3", "model": str(draft_dir), "num_speculative_tokens": 1}
    args = EngineArgs(
        model=str(model_dir),
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]  # a Literal there
        enforce_eager=not engine.compile,
        # What is compiled holds up to this many tokens: a prompt's chunk, or a tree for each request of a batch.
        max_num_batched_tokens=max(engine.prefill_chunk_tokens, engine.max_batch * (MAX_NODES + 1)),
        max_num_seqs=engine.max_batch,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        logging_config=LoggingConfig(configure_logging=False, pylogging_config_file=None),
        attention_backend=None if current_platform.is_cpu() else AttentionBackendEnum.CUSTOM,
        speculative_config=speculative,
    )
    args.compilation_config.mode = CompilationMode.VLLM_COMPILE if engine.compile else CompilationMode.NONE
    args.compilation_config.cudagraph_mode = CUDAGraphMode.NONE  # whole iterations are captured, by the engine
    with _environment_restored():
        _import_architectures(model_dir, draft_dir)
        return args.create_engine_config()


def _import_architectures(model_dir: Path, draft_dir: Path | None) -> None:
    """Imports the models' classes, which vLLM would else first inspect in subprocesses, 10 seconds each."""
    names = list(read_config(model_dir).get("architectures") or ())
    if draft_dir is not None:
        names += [*(read_config(draft_dir).get("architectures") or ()), "Eagle3LlamaForCausalLM"]
    for name in names:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _load_target(config: VllmConfig, model_dir: Path, dtype: torch.dtype, auxiliary: bool) -> VllmTarget:
    module = _load_module(config)
    model, facts = module.model, config.model_config
    if auxiliary:
        if not supports_eagle3(type(model)):
            raise ModelError(f"{type(model).__name__} gives no auxiliary hidden states, which EAGLE-3 needs")
        model.set_aux_hidden_state_layers(_auxiliary_layers(_head_config(config).hf_config, model))
    spec = TargetSpec(
        kv=module.kv_geometry(dtype),
        vocab_size=facts.get_vocab_size(),
        hidden_size=facts.get_hidden_size(),
        max_position=facts.max_model_len,
        eos_token_ids=read_eos_token_ids(model_dir),
    )
    return VllmTarget(module, spec, auxiliary)


def _load_draft(config: VllmConfig, target: VllmTarget, dtype: torch.dtype, device: torch.device) -> VllmDraft:
    head = _head_config(config)
    # The head's rotary table must reach as far as the target: many heads were trained on, and name, fewer positions.
    head.hf_config.max_position_embeddings = max(head.hf_config.max_position_embeddings, target.spec.max_position)
    hidden_size = head.hf_config.hidden_size
    if hidden_size != target.spec.hidden_size:
        raise ModelError(
            f"the draft head's hidden size {hidden_size} differs from the model's {target.spec.hidden_size}"
        )
    module = _load_module(config, head)
    model, host = module.model, target._module.model
    if not hasattr(model, "combine_hidden_states"):
        raise ModelError(f"{type(model).__name__} is not an EAGLE-3 head")
    if not model.has_own_embed_tokens:
        model.model.embed_tokens = host.model.embed_tokens
    if not model.has_own_lm_head:
        model.lm_head = host.lm_head
    token_ids = torch.arange(model.config.draft_vocab_size, device=device)
    if model.draft_id_to_target_id is not None:
        token_ids += model.draft_id_to_target_id.data
    if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < target.spec.vocab_size:
        raise ModelError("the draft head's vocabulary names tokens that the model doesn't have")
    return VllmDraft(module, DraftSpec(module.kv_geometry(dtype), hidden_size, len(token_ids)), token_ids)


def _load_module(config: VllmConfig, model_config: ModelConfig | None = None) -> _Module:
    """Builds a model and finds the attention layers that it added to the configuration's registry."""
    registered = config.compilation_config.static_forward_context
    before = set(registered)
    model = get_model(vllm_config=config, model_config=model_config)
    names = [n for n, layer in registered.items() if n not in before and isinstance(layer, AttentionLayerBase)]
    return _Module(model, config, sorted(names, key=extract_layer_index))


def _head_config(config: VllmConfig) -> ModelConfig:
    assert config.speculative_config is not None
    return config.speculative_config.draft_model_config


def _auxiliary_layers(head: Any, model: Any) -> tuple[int, ...]:
    """The layers whose entering values the head was trained on: from its configuration, else EAGLE-3's own choice."""
    eagle = getattr(head, "eagle_config", None) or {}
    named = getattr(head, "eagle_aux_hidden_state_layer_ids", None) or eagle.get("eagle_aux_hidden_state_layer_ids")
    layers = tuple(sorted(set(named or model.get_eagle3_default_aux_hidden_state_layers())))
    if len(layers) != NUM_AUXILIARY:
        raise ModelError(f"the draft head fuses layers {list(layers)}, not {NUM_AUXILIARY} different ones")
    return layers


@contextmanager
def _load_errors(model_dir: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except _LOAD_ERRORS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"{model_dir}: vLLM can't load this model: {' '.join(lines)[:500]}") from error


@contextmanager
def _worker_state(config: VllmConfig, device: torch.device) -> Iterator[None]:
    """What vLLM expects of a worker process while it builds a model."""
    config.kernel_config.ir_op_priority.set_default()
    vllm.ir.set_default_torch_wrap(config.compilation_config.ir_enable_torch_wrap)
    with ExitStack() as stack:
        if device.type == "cpu":  # vLLM calls these on any device; without an accelerator they raise
            nothing = {name: lambda *_: None for name in ("empty_cache", "synchronize")}
            stack.enter_context(_replaced(torch.accelerator, **nothing))
        else:
            current_platform.set_device(device)
        _initialise_groups(device)
        yield


def _initialise_groups(device: torch.device) -> None:
    """Sets up vLLM's process groups, once per process, for one rank that never communicates.

    vLLM makes a dozen Gloo groups even then, each with a listening port and threads. All of them are one group without
    transport here.
    """
    if parallel_state.model_parallel_is_initialized():
        return
    if not torch.distributed.is_initialized():
        with _replaced(sys, excepthook=sys.excepthook):  # PyTorch's would put a rank before each line
            torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=1)
        atexit.register(torch.distributed.destroy_process_group)
    world = torch.distributed.group.WORLD
    with _replaced(torch.distributed, new_group=lambda *_, **__: world):
        parallel_state.init_distributed_environment(1, 0, "unused://", device.index or 0, current_platform.dist_backend)
        parallel_state.initialize_model_parallel(1, 1)


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def _environment_restored() -> Iterator[None]:
    """vLLM prepares the environment (LD_PRELOAD, …) of worker processes that it won't start here."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
