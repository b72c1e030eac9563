"""The default model with its draft head: greedy text in float32 equals transformers' `generate`, on both providers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from engine_helpers import BUSHY, TinyPipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from branchline.config import Config
from branchline.core import Request, SamplingParams
from branchline.engine.assemble import assemble
from branchline.engine.models.locate import locate_model
from branchline.engine.models.protocol import Models

pytestmark = [pytest.mark.models, pytest.mark.timeout(900)]

PROMPTS = Path(__file__).parents[2] / "benchmarks/data/spec_bench_dev.jsonl"
COUNT, TOKENS, LONGEST, ORACLE_BATCH = 24, 48, 200, 8


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    """Chat prompts spread over all categories, those of at most LONGEST tokens (the oracle is slow)."""
    tokenizer = AutoTokenizer.from_pretrained(locate_model("default"))
    turns = [json.loads(line)["turns"][0] for line in PROMPTS.read_text().splitlines()]
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False
        )
        for turn in turns
    ]
    short = [tuple(ids) for ids in rendered if len(ids) <= LONGEST]
    return short[:: len(short) // COUNT][:COUNT]


@pytest.fixture(scope="module")
def oracle(prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """transformers' own greedy `generate`; in batches of prompts of similar length, padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(locate_model("default"), dtype=torch.float32).eval()
    eos = model.generation_config.eos_token_id
    outputs: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), ORACLE_BATCH):
        batch = by_length[start : start + ORACLE_BATCH]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.tensor([[eos] * (width - len(prompts[index])) + list(prompts[index]) for index in batch])
        mask = torch.tensor([[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in batch])
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=eos)[
            :, width:
        ].tolist()
        for index, tokens in zip(batch, generated, strict=True):
            outputs[index] = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
    return [outputs[index] for index in range(len(prompts))]


@pytest.fixture(scope="module", params=["reference", "vllm"])
def models(request: pytest.FixtureRequest) -> Models:
    config = Config().override(**{"model.provider": request.param, "model.dtype": "float32", "model.device": "cpu"})
    models, _ = assemble(config)
    return models


def requests_for(
    models: Models, prompts: list[tuple[int, ...]], sampling: SamplingParams | None = None
) -> list[Request]:
    stop = models.target.spec.eos_token_ids
    return [
        Request(str(index), prompt, TOKENS, sampling or SamplingParams(), stop_token_ids=stop)
        for index, prompt in enumerate(prompts)
    ]


def pipeline(models: Models, tree: str, **engine: object) -> TinyPipeline:
    return TinyPipeline(models, tree, kv_cache_mib=256, block_size=16, max_model_len=1024, max_batch=8, **engine)


@pytest.mark.parametrize("in_flight", [1, 8])
def test_greedy_text_equals_generate(
    models: Models, prompts: list[tuple[int, ...]], oracle: list[list[int]], in_flight: int
) -> None:
    engine = pipeline(models, "default")
    outputs = engine.run_text(requests_for(models, prompts), in_flight)
    assert len(oracle) == COUNT
    assert [outputs[str(index)] for index in range(COUNT)] == oracle
    emitted = sum(map(len, oracle)) - COUNT
    assert emitted > 1.25 * engine.forwards, "drafting no longer helps"


def test_sampled_text_equals_plain_decoding(models: Models, prompts: list[tuple[int, ...]]) -> None:
    requests = requests_for(models, prompts, SamplingParams(temperature=0.8, top_p=0.95, seed=17))
    plain = pipeline(models, "none").run_text(requests, in_flight=8)
    assert pipeline(models, "default").run_text(requests, in_flight=8) == plain
    few = requests[::6]
    alone = pipeline(models, "default").run_text(few, in_flight=1)
    assert alone == {each.request_id: plain[each.request_id] for each in few}


def test_a_superset_tree_accepts_at_least_as_much(models: Models, prompts: list[tuple[int, ...]]) -> None:
    """Teacher-forced along one text: at each position the first iteration after a hand-off."""
    (request,) = requests_for(models, prompts[5:6])
    text = pipeline(models, "none").run_text([request])["0"][:16]
    small, large = pipeline(models, "[[0],[1],[0,0]]"), pipeline(models, BUSHY)
    gained = 0
    for position in range(len(text) - 1):
        prefix = Request("0", request.prompt, TOKENS, emitted=tuple(text[:position]))
        lengths = []
        for engine in (small, large):
            sample = engine.hand_off(prefix)
            (result,) = engine.decode.step().results
            lengths.append(len(result.token_ids))
            engine.decode.release(sample.allocation)
        assert lengths[1] >= lengths[0]
        gained += lengths[1] - lengths[0]
    assert gained > 0, "the larger tree never helped: nothing was tested"


def test_acceptance_after_a_prefix_hit_equals_a_cold_run(models: Models, prompts: list[tuple[int, ...]]) -> None:
    requests = [dataclasses.replace(request, max_tokens=24) for request in requests_for(models, prompts[:8])]
    cold, warm = pipeline(models, "default", prefix_caching=False), pipeline(models, "default")
    texts = cold.run_text(requests, in_flight=8)
    for _ in range(2):
        assert warm.run_text(requests, in_flight=8) == texts
        assert warm.forwards == cold.forwards
    for request in requests:
        task = warm.prefill.begin(request)
        assert task.cached == (task.length - 1) // 16 * 16 > 0
        warm.prefill.release(task)
