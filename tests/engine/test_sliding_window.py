"""A model with a sliding window, through prefill in chunks, trees and rewinds: a node's window follows its depth, not
its row. The window is shorter than the tree is wide, so that one by row number would cut off ancestors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_helpers import BUSHY, VOCAB, TinyPipeline, load_tiny, save_tiny_pair
from model_helpers import edit_config
from transformers import AutoModelForCausalLM, MistralForCausalLM

from branchline.core import Request

pytestmark = pytest.mark.models

WINDOW = 6


@torch.no_grad()
@pytest.mark.parametrize("tree", ["none", "chain:4", BUSHY])
def test_greedy_text_is_the_oracles(tmp_path: Path, tree: str) -> None:
    model, head = save_tiny_pair(tmp_path)
    edit_config(model, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=WINDOW)
    oracle = AutoModelForCausalLM.from_pretrained(model).eval()
    assert isinstance(oracle, MistralForCausalLM)
    generator = torch.Generator().manual_seed(3)
    lengths = [2, 7, 23, 40]
    requests = [
        Request(str(index), tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()), 40)
        for index, length in enumerate(lengths)
    ]
    pipeline = TinyPipeline(load_tiny((model, head)), tree, prefill_chunk_tokens=16)
    texts = pipeline.run_text(requests, in_flight=4)
    for request in requests:
        tokens = texts[request.request_id]
        logits = oracle(torch.tensor([[*request.context, *tokens]])).logits[0, len(request.context) - 1 : -1]
        assert len(tokens) == 40
        assert logits.argmax(1).tolist() == tokens
    if tree != "none":
        assert pipeline.forwards < sum(map(len, texts.values())), "no draft was accepted, so no tree was rewound"
