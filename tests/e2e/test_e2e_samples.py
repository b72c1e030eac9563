"""Several samples of one prompt, and what the new options do, through gateway and workers as processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e_helpers import Fleet, running_fleet, wait_until_idle
from e2e_model import TinyModel

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

SAMPLED: dict[str, Any] = {
    "prompt": "a bad cab abc",
    "max_tokens": 40,
    "ignore_eos": True,
    "temperature": 1.0,
    "seed": 5,
}


def test_samples_differ_and_repeat(one_of_each: Fleet) -> None:
    """The first samples are the same whatever n is, and with plain decoding; sample 0 is what n = 1 gives."""
    client = one_of_each.client
    four = client.complete(**SAMPLED, n=4)
    assert len({sample.text for sample in four.samples}) == 4
    assert client.complete(**SAMPLED).token_ids == four.token_ids
    texts = [sample.token_ids for sample in four.samples]
    assert [sample.token_ids for sample in client.complete(**SAMPLED, n=4, draft_nodes=0).samples] == texts
    assert [sample.token_ids for sample in client.complete(**SAMPLED, n=16).samples[:4]] == texts, (
        "more than fit at once"
    )
    assert four.speculation.accepted > 0
    wait_until_idle(client)


def test_samples_end_one_by_one(one_of_each: Fleet) -> None:
    client = one_of_each.client
    firsts = {sample.token_ids[0] for sample in client.complete(**SAMPLED, n=8).samples}
    assert len(firsts) > 1
    ended = client.complete(**SAMPLED, n=8, stop_token_ids=[min(firsts)])
    lengths = [len(sample.token_ids) for sample in ended.samples]
    assert 1 in lengths, "the first token ends one of them"
    assert max(lengths) > 1
    assert ended.failovers == 0
    wait_until_idle(client)


def test_log_probabilities(one_of_each: Fleet) -> None:
    done = one_of_each.client.complete(**SAMPLED, n=2, logprobs=3)
    for sample in done.samples:
        assert len(sample.logprobs) == len(sample.token_ids) == 40
        for token_id, entry in zip(sample.token_ids, sample.logprobs, strict=True):
            top = dict(entry.top)
            assert len(top) == 3
            assert entry.logprob == pytest.approx(top.get(token_id, entry.logprob), abs=1e-4)
            assert entry.logprob <= max(top.values()) + 1e-5


def test_edits(one_of_each: Fleet, tiny: TinyModel) -> None:
    client = one_of_each.client
    never = tiny.tokenizer.encode("d")[0]
    done = client.complete(
        **SAMPLED, bad_words=["ab", "c"], logit_bias={never: -100.0}, repetition_penalty=1.3, frequency_penalty=0.5
    )
    assert "ab" not in done.text
    assert "c" not in done.text
    assert never not in done.token_ids
    early = client.complete(**SAMPLED | {"ignore_eos": False}, min_tokens=25)
    assert len(early.token_ids) >= 25


def test_preempted_requests_give_the_same_text(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    """More sequences than blocks, of several priorities: some give their blocks back, nothing is lost."""
    options = [
        SAMPLED | {"prompt": "abc " * 20, "max_tokens": 400, "seed": seed, "priority": seed % 3 - 1, "n": 1 + seed % 2}
        for seed in range(6)
    ]
    config = tiny.config(**{"engine.kv_cache_mib": 3})
    with running_fleet(config, tmp_path_factory.mktemp("fleet")) as fleet:
        with ThreadPoolExecutor(len(options)) as pool:
            together = list(pool.map(lambda option: fleet.client.complete(**option), options))
        assert sum(done.preemptions for done in together) > 0
        assert sum(done.failovers for done in together) == 0
        for option, done in zip(options, together, strict=True):
            alone = fleet.client.complete(**option)
            assert [sample.token_ids for sample in done.samples] == [sample.token_ids for sample in alone.samples]
        wait_until_idle(fleet.client)
