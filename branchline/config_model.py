"""What is served (`model`), and the sizes of the engine that does it (`engine`)."""

from __future__ import annotations

from dataclasses import dataclass

from branchline.config_base import require as _require
from branchline.config_base import require_choice as _choice

DTYPES = ("bfloat16", "float16", "float32")
PROVIDERS = ("vllm", "reference")
#: Below this many cores the workers of one machine share them all; from here on each gets its own.
CORES_TO_SHARE_OUT = 4
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class ModelConfig:
    """What is served. `model` and `draft` take a directory, a Hugging Face id, or `default`; `draft` also `none`."""

    model: str = "default"
    draft: str = "default"
    dtype: str = "bfloat16"
    provider: str = "vllm"
    device: str = "auto"
    #: `none`, `chain:K`, `static:FILE`, `dynamic:DEPTH,TOPK,NODES`, an inline list of choices; or what the draft head
    #: brings: `best:N` and `default`.
    tree: str = "default"

    def __post_init__(self) -> None:
        _require(bool(self.model), "model.model: must not be empty")
        _require(bool(self.draft), "model.draft: must not be empty")
        _choice("model.dtype", self.dtype, DTYPES)
        _choice("model.provider", self.provider, PROVIDERS)
        _choice("model.device", self.device, DEVICES)


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine, the same for prefill and decode workers."""

    #: Tokens in a KV block.
    block_size: int = 16
    #: Memory for the paged KV cache (target and draft) in MiB.
    kv_cache_mib: int = 1024
    #: The longest sequence in tokens; 0 takes the model's limit.
    max_model_len: int = 0
    #: Requests that decode together.
    max_batch: int = 8
    #: Sizes to which a batch is padded, each with its own CUDA graphs; those above `max_batch` are left out.
    batch_buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    #: Draft fewer nodes while that brings more tokens a second, as it does where many requests run: measured while
    #: serving. False drafts the whole tree for everybody.
    adaptive_tree: bool = True
    #: Tokens that one prefill step computes.
    prefill_chunk_tokens: int = 512
    #: Keep the KV of prompts, and on decode workers of answers, for later prompts that begin alike, in blocks that
    #: nothing else needs.
    prefix_caching: bool = True
    #: Compute threads of a worker; 0 chooses by role and cores, see `threads_for`.
    threads: int = 0
    #: Compile the model with vLLM's compiler: faster steps for a start that takes a minute or two longer. Needs the
    #: `vllm` provider and a C++ compiler on every node.
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "kv_cache_mib", "max_batch", "prefill_chunk_tokens"):
            _require(getattr(self, name) >= 1, f"engine.{name}: must be at least 1, got {getattr(self, name)}")
        _require(
            all(size >= 1 for size in self.batch_buckets),
            f"engine.batch_buckets: must be positive, got {list(self.batch_buckets)}",
        )
        for name in ("max_model_len", "threads"):
            _require(getattr(self, name) >= 0, f"engine.{name}: must not be negative, got {getattr(self, name)}")

    def threads_for(self, role: str, cores: int, shared: bool) -> int:
        """Compute threads of a `prefill`, `decode` or `gateway` process on `cores` cores, shared with others or not.

        On shared cores waiting threads must sleep, and then waking one costs a decode step more than a second
        core gains it; a prompt's larger products do gain (docs/architecture.md, section 9).
        """
        if role == "gateway":
            return 1
        return self.threads or (1 if role == "decode" and shared else max(1, cores))
