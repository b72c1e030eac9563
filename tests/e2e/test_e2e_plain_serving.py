"""What serving does, done with plain decoding, with a chain and with a tree: the same, and with the same tokens.

Plain decoding (no tree, no draft head) is the yardstick: what it says, the others must say too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from e2e_helpers import Fleet, Options, complete_all, complete_disturbed, running_fleet, wait_until_idle
from e2e_model import MAX_LENGTH, TinyModel

from branchline.client import Client, Completion
from branchline.engine.tree_spec import parse_tree

pytestmark = [pytest.mark.wire, pytest.mark.timeout(240)]

PROMPTS = ("a bad cab", "fade a lamb", "in a dimmed den ", "h" * 33)
SAMPLED: Options = {"temperature": 0.8, "top_p": 0.9, "top_k": 12}
LONG: Options = {"ignore_eos": True, "max_tokens": 120}

Agree = Callable[[str, Any], None]


@dataclass(frozen=True)
class Served:
    fleet: Fleet
    tree: str

    @property
    def client(self) -> Client:
        return self.fleet.client

    def complete(self, **options: Any) -> Completion:
        return self.client.complete(**options)


@pytest.fixture(scope="module", params=["none", "chain:3", "default"])
def served(
    request: pytest.FixtureRequest, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    flags = {"model.tree": request.param, "decode.replicas": 2}
    if request.param == "none":
        flags["model.draft"] = "none"
    with running_fleet(tiny.config(**flags), tmp_path_factory.mktemp("fleet")) as fleet:
        yield Served(fleet, request.param)


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    return {}


@pytest.fixture
def agree(said: dict[str, Any]) -> Agree:
    """Whatever one kind of serving has said under a name, the others must say too."""

    def compare(name: str, value: Any) -> None:
        assert value == said.setdefault(name, value)

    return compare


def test_greedy_text_is_that_of_transformers(served: Served, tiny: TinyModel) -> None:
    for prompt in PROMPTS:
        completion = served.complete(prompt=prompt, **LONG)
        assert list(completion.token_ids) == tiny.greedy(prompt, 120)
        assert completion.text == tiny.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.finish_reason == "length"
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(prompt), 120)


def test_a_repeated_prompt_is_computed_once(served: Served) -> None:
    prompt = "once more " * 12
    first = served.complete(prompt=prompt, **LONG)
    length = first.usage.prompt_tokens
    assert first.usage.cached_tokens < length // 2, "no other test has this prompt"
    again = served.complete(prompt=prompt, **LONG)
    assert again.usage.cached_tokens == (length - 1) // 16 * 16 > 0
    assert again.token_ids == first.token_ids
    assert again.speculation == first.speculation


def test_speculation_is_reported(served: Served) -> None:
    completion = served.complete(prompt=PROMPTS[0], **LONG)
    speculation = completion.speculation
    assert served.client.info().tree == served.tree
    assert speculation.target_forwards + speculation.accepted == 119, "the first token is prefill's"
    if served.tree == "none":
        assert speculation.drafted == 0
    else:
        assert speculation.accepted > 10


def test_chunks_come_one_by_one(served: Served) -> None:
    with served.client.generate(prompt=PROMPTS[1], **LONG) as stream:
        chunks = list(stream)
    forwards = stream.result.speculation.target_forwards
    assert max(len(chunk.token_ids) for chunk in chunks) <= 1 + parse_tree(served.tree).depth
    assert len(chunks) >= forwards, "each step's tokens come in a chunk of their own"
    assert "".join(chunk.text for chunk in chunks) == stream.result.text


def test_prompts_in_three_forms(served: Served, tiny: TinyModel, agree: Agree) -> None:
    """The tiny chat template puts a blank behind each message."""
    text = served.complete(prompt="be bad cain and abel ", **LONG)
    ids = served.complete(token_ids=tiny.tokenizer.encode("be bad cain and abel "), **LONG)
    messages = [{"role": "system", "content": "be bad"}, {"role": "user", "content": "cain and abel"}]
    chat = served.complete(messages=messages, **LONG)
    assert text.token_ids == ids.token_ids == chat.token_ids
    agree("three forms", text.token_ids)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 16, 17])
def test_max_tokens(served: Served, tiny: TinyModel, max_tokens: int) -> None:
    completion = served.complete(prompt=PROMPTS[2], max_tokens=max_tokens, ignore_eos=True)
    assert list(completion.token_ids) == tiny.greedy(PROMPTS[2], 17)[:max_tokens]
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("sampling", [{}, SAMPLED | {"seed": 4}], ids=["greedy", "sampled"])
def test_the_context_limit_ends_a_text(served: Served, agree: Agree, sampling: Options) -> None:
    """No tree may reach beyond it, and no token before it may be missing."""
    completion = served.complete(prompt="a bad cab " * 200, ignore_eos=True, **sampling)
    assert completion.usage.prompt_tokens == 2000
    assert completion.usage.completion_tokens == MAX_LENGTH - 2000
    assert completion.finish_reason == "length"
    agree(f"context limit {sampling}", completion.token_ids)


@pytest.mark.parametrize("start", [0, 1, 40, 41, 42])
def test_stop_strings(served: Served, agree: Agree, start: int) -> None:
    """Five characters from anywhere in the text, whatever steps brought them; the text ends before them."""
    whole = served.complete(prompt=PROMPTS[0], **LONG, **SAMPLED, seed=2)
    stop = whole.text[start : start + 5]
    stopped = served.complete(prompt=PROMPTS[0], **LONG, **SAMPLED, seed=2, stop=["never this one", stop])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert stopped.usage.completion_tokens == len(stopped.token_ids)
    agree(f"stop at {start}", stopped.token_ids)


def test_end_of_sequence_tokens(served: Served, agree: Agree) -> None:
    """The model's own (id 0), and one more that the request names."""
    whole = served.complete(prompt=PROMPTS[1], **LONG, temperature=1.5, seed=1)
    ended = served.complete(prompt=PROMPTS[1], max_tokens=120, temperature=1.5, seed=1)
    at = whole.token_ids.index(0)
    assert ended.token_ids == whole.token_ids[: at + 1]
    assert ended.finish_reason == "stop"
    named = whole.token_ids[20]
    ended = served.complete(prompt=PROMPTS[1], **LONG, temperature=1.5, seed=1, stop_token_ids=[named])
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(named) + 1]
    agree("ended", (whole.token_ids, ended.token_ids))


def test_a_seed_repeats_a_text(served: Served, agree: Agree) -> None:
    texts = [served.complete(prompt=PROMPTS[3], **LONG, **SAMPLED, seed=seed) for seed in (1, 2, 1)]
    assert texts[0].token_ids == texts[2].token_ids != texts[1].token_ids
    agree("seeds", [completion.token_ids for completion in texts])
    drawn = served.complete(prompt=PROMPTS[3], **LONG, **SAMPLED)
    assert served.complete(prompt=PROMPTS[3], **LONG, **SAMPLED, seed=drawn.seed).token_ids == drawn.token_ids


def test_many_at_once(served: Served, agree: Agree) -> None:
    """More than one decode worker takes into its batch; of different lengths, greedy and sampled."""
    requests: list[Options] = [
        LONG | {"prompt": prompt * repeat, "max_tokens": 20 + 7 * number} | sampling
        for number, (prompt, repeat) in enumerate((prompt, repeat) for prompt in PROMPTS for repeat in (1, 3, 8))
        for sampling in ({}, SAMPLED | {"seed": number})
    ]
    together = complete_all(served.client, requests)
    alone = [served.complete(**options) for options in requests[::5]]
    assert [c.token_ids for c in together[::5]] == [c.token_ids for c in alone]
    agree("many", [completion.token_ids for completion in together])


def test_cancelling_frees_everything(served: Served, agree: Agree) -> None:
    with served.client.generate(prompt=PROMPTS[0], max_tokens=1500, ignore_eos=True, **SAMPLED, seed=6) as stream:
        token_ids = [token for _, chunk in zip(range(20), stream, strict=False) for token in chunk.token_ids]
    wait_until_idle(served.client, 1.0)
    agree("cancelled", token_ids[:20])


def test_a_decode_worker_is_killed_in_mid_stream(served: Served, agree: Agree) -> None:
    requests = [LONG | {"prompt": PROMPTS[0], "max_tokens": 500} | options for options in ({}, SAMPLED | {"seed": 8})]
    undisturbed = complete_all(served.client, requests)
    try:
        disturbed = complete_disturbed(
            served.client, requests, lambda: served.fleet.kill(served.fleet.busiest("decode").address)
        )
    finally:
        served.fleet.revive()
    assert [c.token_ids for c in disturbed] == [c.token_ids for c in undisturbed]
    assert [c.text for c in disturbed] == [c.text for c in undisturbed]
    assert any(completion.failovers for completion in disturbed)
    agree("killed", [completion.token_ids for completion in disturbed])
