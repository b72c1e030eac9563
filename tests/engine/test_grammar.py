"""A grammar's masks follow each node's path, and cost no token: the text is that of plain, masked decoding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from engine_helpers import BUSHY, VOCAB, TinyPipeline
from test_capturable import TraceExecutor
from test_dynamic_tree import prompts
from transformers import PreTrainedModel

from branchline.core import Request, SamplingParams
from branchline.engine.execute import Executor
from branchline.engine.models.protocol import Models

pytestmark = pytest.mark.models


class Climbing:
    """A token may be followed by itself or by one of the next `reach` of the vocabulary, which wraps around."""

    def __init__(self, reach: int = 4) -> None:
        self.reach = reach
        self.output: list[int] = []

    def follows(self, before: int, token: int) -> bool:
        return (token - before) % VOCAB <= self.reach

    def allowed(self, path: Sequence[int]) -> torch.Tensor | None:
        whole = [*self.output, *path]
        if not all(self.follows(*pair) for pair in itertools.pairwise(whole)):
            return None
        if not whole:
            return torch.ones(VOCAB, dtype=torch.bool)
        return torch.tensor([self.follows(whole[-1], token) for token in range(VOCAB)])

    def advance(self, token_ids: Sequence[int]) -> None:
        self.output += token_ids


def decode(
    tiny: Models, requests: list[Request], tree: str, executor: Executor | None = None, pipelined: bool = False
) -> list[list[int]]:
    """All requests in one batch, every other one under a grammar."""
    pipeline = TinyPipeline(tiny, tree, executor, pipelined, max_batch=4)
    texts = {}
    for index, request in enumerate(requests):
        sample = pipeline.hand_off(request, grammar=Climbing() if index % 2 == 0 else None)
        texts[sample.allocation] = [sample.first_token]
    while pipeline.decode.running:
        for result in pipeline.decode.step().results:
            texts[result.allocation] += result.token_ids
    return list(texts.values())


def oracle(model: PreTrainedModel, request: Request, grammar: Climbing | None) -> list[int]:
    """Greedy, token by token, the forbidden tokens left out."""
    text: list[int] = []
    for _ in range(request.max_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt, *text]])).logits[0, -1]
        allowed = grammar.allowed(text) if grammar else None
        text.append(int((logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))).argmax()))
    return text


@pytest.mark.parametrize("tree", ["none", BUSHY, "dynamic:4,3,12"])
def test_greedy_text_is_the_oracles(tiny: Models, tiny_oracle: PreTrainedModel, tree: str) -> None:
    requests = [Request(str(index), prompt, 30) for index, prompt in enumerate(prompts(8, 4))]
    expected = [
        oracle(tiny_oracle, request, Climbing() if index % 2 == 0 else None) for index, request in enumerate(requests)
    ]
    assert expected[0] != oracle(tiny_oracle, requests[0], None), "the grammar forbids nothing"
    assert decode(tiny, requests, tree) == expected
    assert decode(tiny, requests, tree, pipelined=True) == expected


def test_sampled_text_is_that_of_plain_decoding(tiny: Models) -> None:
    """Both halves of the iteration are captured on their own, and penalties see the same path as the grammar."""
    requests = [
        Request(str(index), prompt, 30, SamplingParams(1.0, 0.9, seed=index, repetition_penalty=1.2))
        for index, prompt in enumerate(prompts(9, 4))
    ]
    plain = decode(tiny, requests, "none")
    executor = TraceExecutor(idle_slot=4)
    assert decode(tiny, requests, BUSHY, executor) == plain
    assert {key[0] for key in executor.traces} == {"verify", "advance"}
    for text in plain[::2]:
        assert all(Climbing().follows(*pair) for pair in itertools.pairwise(text))
