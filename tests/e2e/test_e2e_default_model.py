"""The default model with its draft head, served in float32 by processes, against transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from e2e_helpers import START_S, Streamed, wait_until_idle
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.local_system import REPOSITORY, LocalSystem
from branchline.client import Client
from branchline.config import Config
from branchline.engine.models.locate import locate_model

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]

PROMPTS = REPOSITORY / "benchmarks/data/spec_bench_dev.jsonl"
COUNT, TOKENS, LONGEST = 8, 32, 400
TARGET = "127.0.0.1:50051"


@pytest.fixture(scope="module")
def questions() -> list[str]:
    """Short ones, spread over all categories."""
    turns = [json.loads(line)["turns"][0] for line in PROMPTS.read_text().splitlines()]
    short = [turn for turn in turns if len(turn) <= LONGEST]
    return short[:: len(short) // COUNT][:COUNT]


@pytest.fixture(scope="module")
def expected(questions: list[str]) -> list[list[int]]:
    """What transformers generates greedily, the model's own end-of-sequence token included."""
    directory = locate_model("default")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    outputs = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        outputs.append(output[0, ids.shape[1] :].tolist())
    return outputs


@pytest.fixture(scope="module")
def client(expected: list[list[int]]) -> Iterator[Client]:  # noqa: ARG001 - transformers has had the machine to itself
    settings = {
        "model.dtype": "float32",
        "model.provider": "reference",
        "model.device": "cpu",
        "engine.adaptive_tree": False,  # it may rightly draft nothing where that is faster
    }
    with LocalSystem(Config().override(**settings), START_S) as system, Client(system.address) as client:
        yield client
        wait_until_idle(client)


@pytest.mark.parametrize("in_flight", [1, 8])
def test_greedy_text_is_that_of_transformers(
    client: Client, questions: list[str], expected: list[list[int]], in_flight: int
) -> None:
    options = [{"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS} for question in questions]
    with ThreadPoolExecutor(in_flight) as pool:
        completions = list(pool.map(lambda request: Streamed(client, request).run(), options))
    assert [list(completion.token_ids) for completion in completions] == expected
    emitted = sum(c.speculation.accepted + c.speculation.target_forwards for c in completions)
    assert emitted == sum(map(len, expected)) - COUNT, "first tokens are prefill's"
    assert emitted > 1.2 * sum(c.speculation.target_forwards for c in completions), "drafting no longer helps"


def test_the_readme_example_runs(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert example is not None
    assert TARGET in example[1]
    exec(compile(example[1].replace(TARGET, client.target), "README.md", "exec"), {"__name__": "example"})
    # The completion may have lines of its own: what it says depends on the processor's bf16.
    printed = capsys.readouterr().out
    completion = re.match(r"(?s).+? (FinishReason\.)?(stop|length|STOP|LENGTH) \d+ \d\.\d+\n", printed)
    assert completion, printed
    assert len(printed[completion.end() :].split()) > 5
