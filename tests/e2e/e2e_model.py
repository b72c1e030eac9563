"""A tiny model that can be served: a random Llama, a random draft head, a tokenizer and a chat template, on disk.

Its vocabulary has sixteen tokens, so that a random head's guesses are right now and then and drafts get accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from model_helpers import head_config, head_tensors, save_head, save_tiny_model, tiny_config
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from branchline.config import Config, from_mapping

EOS = "<|end|>"
#: "Ġ" is how byte-level tokenizers write a space.
ALPHABET = [EOS, "Ġ", *"abcdefghijklmn"]
MAX_LENGTH = 2048
#: Wider and deeper than the default tree: much is accepted off the first path, and its KV has to be moved.
TREE = "[[0],[1],[2],[0,0],[0,1],[1,0],[0,0,0],[0,0,1],[1,0,0],[0,0,0,0]]"

_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ m.content }} {% endfor %}"
)


@dataclass(frozen=True)
class TinyModel:
    """`model` and `head` are directories; `oracle` is the same model in transformers."""

    model: Path
    head: Path
    oracle: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def config(self, **flags: Any) -> Config:
        """One worker of each role, a float32 engine with few blocks, impatient timeouts; flags are laid over."""
        model = {"model": str(self.model), "draft": str(self.head), "dtype": "float32", "provider": "reference"}
        engine = {"kv_cache_mib": 48, "max_batch": 8, "prefill_chunk_tokens": 64, "threads": 1}
        sections = {
            "model": model | {"device": "cpu", "tree": TREE},
            # Trees that follow the load would make what is drafted depend on the clock.
            "engine": engine | {"adaptive_tree": False},
            "prefill": {"lease_ttl_s": 3.0},
            "decode": {"lease_ttl_s": 3.0},
            "gateway": {"request_timeout_s": 60.0},
            "ray": {"start_timeout_s": 90.0},
        }
        return from_mapping(sections).override(**flags)

    @torch.inference_mode()
    def greedy(self, prompt: str, tokens: int) -> list[int]:
        """The ids that transformers generates, past every end-of-sequence token."""
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        output = self.oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        generated: list[int] = output[0, ids.shape[1] :].tolist()
        return generated


def save_served_model(directory: Path, **differences: Any) -> TinyModel:
    """`differences` from the usual model's configuration make another one."""
    sizes = {"vocab_size": len(ALPHABET), "initializer_range": 0.25, "max_position_embeddings": MAX_LENGTH}
    config = tiny_config(**sizes, eos_token_id=0, **differences)
    oracle = save_tiny_model(directory / "model", config)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory / "model")
    return TinyModel(directory / "model", _save_head(directory / "head"), oracle, tokenizer)


def _save_head(directory: Path) -> Path:
    size = len(ALPHABET)
    whole_vocabulary = {"d2t": torch.zeros(size, dtype=torch.int64), "t2d": torch.ones(size, dtype=torch.bool)}
    config = head_config(vocab_size=size, draft_vocab_size=size, max_position_embeddings=MAX_LENGTH)
    return save_head(directory, config, head_tensors(draft_vocab=size) | whole_vocabulary)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter; characters outside the alphabet are dropped."""
    vocabulary = {token: index for index, token in enumerate(ALPHABET)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, chat_template=_CHAT_TEMPLATE)
