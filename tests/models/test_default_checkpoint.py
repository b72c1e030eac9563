"""The default model and its head, loaded for real: against transformers and against a second implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_eagle3 import dense_eagle3
from model_helpers import DenseAttention
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from branchline.config import EngineConfig
from branchline.engine.models.checkpoint import read_config
from branchline.engine.models.eagle3 import Eagle3Head
from branchline.engine.models.load import load_reference
from branchline.engine.models.locate import locate_draft, locate_model
from branchline.engine.models.reference import ReferenceTarget

pytestmark = pytest.mark.models

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "What is 17 + 25? Show the steps.",
    "Write a short poem about a lighthouse.",
)
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return locate_model("default")


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> tuple[ReferenceTarget, Eagle3Head]:
    cpu = torch.device("cpu")
    target, head = load_reference(
        model_dir, locate_draft("default"), torch.float32, cpu, EngineConfig(), lambda _: None
    )
    assert isinstance(target, ReferenceTarget)
    assert isinstance(head, Eagle3Head)
    return target, head


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def texts(model_dir: Path, oracle: PreTrainedModel) -> list[tuple[int, torch.Tensor]]:
    """For each prompt its length, and prompt plus transformers' greedy answer, `[tokens]`."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    answers = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        sequence = oracle.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append((ids["input_ids"].shape[1], sequence[0]))
    return answers


@torch.no_grad()
def test_greedy_equals_transformers(
    loaded: tuple[ReferenceTarget, Eagle3Head], texts: list[tuple[int, torch.Tensor]]
) -> None:
    target, _ = loaded
    for prompt_length, text in texts:
        attention, sequence = DenseAttention(), text[:prompt_length].tolist()
        chunk = text[:prompt_length]
        while len(sequence) < len(text):
            positions = torch.arange(len(sequence) - len(chunk), len(sequence))
            chunk = target.logits(target.forward(chunk, positions, attention).hidden[-1:]).argmax(-1)
            sequence.append(int(chunk))
        assert sequence == text.tolist()


@torch.no_grad()
def test_chains_of_the_head_equal_the_dense_implementation(
    loaded: tuple[ReferenceTarget, Eagle3Head], oracle: PreTrainedModel, texts: list[tuple[int, torch.Tensor]]
) -> None:
    """Both draft chains of three from every third position of the answers, the dense one from transformers' states.

    They must be the same tokens, and right about as often as the head's card says of a chain of three: few
    prompts, so the bounds are wide.
    """
    target, head = loaded
    draft_dir = locate_draft("default")
    assert draft_dir is not None
    config, stored = read_config(draft_dir), load_file(draft_dir / "model.safetensors")
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    embedding = target.embedding.double()
    agreed = accepted = chains = 0
    for prompt_length, text in texts:
        states = oracle(text[None], output_hidden_states=True).hidden_states
        fused = torch.cat([states[layer][0] for layer in (2, 15, 27)], -1).double() @ tensors["fc.weight"].T
        auxiliary = target.forward(text, torch.arange(len(text)), DenseAttention()).auxiliary
        assert auxiliary is not None
        for root in range(prompt_length, len(text) - 3, 3):
            ours = draft_chain(head, text[: root + 1], head.fuse(auxiliary[:root]))
            dense = dense_chain(tensors, config, embedding, text[: root + 1], fused[:root])
            agreed += ours == dense
            right = [token == int(text[root + 1 + depth]) for depth, token in enumerate(ours)]
            accepted += [*right, False].index(False)
            chains += 1
    assert agreed == chains
    assert 1.3 < 1 + accepted / chains < 2.2


def draft_chain(head: Eagle3Head, tokens: torch.Tensor, fused: torch.Tensor) -> list[int]:
    """Three greedy drafts after `tokens`; row r pairs tokens[r + 1] with fused[r]."""
    attention, chain = DenseAttention(), []
    normed, recurrent = head.forward(tokens[1:], fused, torch.arange(len(fused)), attention)
    for depth in range(3):
        token = head.target_token_ids[head.logits(normed[-1:]).argmax(-1)]
        chain.append(int(token))
        position = torch.tensor([len(fused) + depth])
        normed, recurrent = head.forward(token, recurrent[-1:], position, attention)
    return chain


def dense_chain(
    tensors: dict[str, torch.Tensor],
    config: dict[str, object],
    embedding: torch.Tensor,
    tokens: torch.Tensor,
    fused: torch.Tensor,
) -> list[int]:
    """The same with everything recomputed at each draft."""
    tokens, chain = tokens[1:], []
    for _ in range(3):
        logits, recurrent = dense_eagle3(tensors, config, embedding, tokens, fused)
        best = logits[-1].argmax()
        chain.append(int(best + tensors["d2t"][best]))
        tokens = torch.cat([tokens, torch.tensor(chain[-1:])])
        fused = torch.cat([fused, recurrent[-1:]])
    return chain
