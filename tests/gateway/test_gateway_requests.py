"""From a client's request to the journal, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny_tokenizer import tiny_tokens

from branchline.core import FinishReason, InvalidRequestError, SamplingParams, SpeculationStats
from branchline.v1 import gateway_pb2, types_pb2
from gateway.journal import AttemptRecord, JournalEntry
from gateway.limits import Limits
from gateway.tokens import Tokens
from gateway.validate import resolve

LIMITS = Limits(max_model_len=64, max_tokens=32)


def ids(*values: int) -> gateway_pb2.TokenIds:
    return gateway_pb2.TokenIds(ids=values)


def chat(*messages: tuple[str, str]) -> gateway_pb2.ChatMessages:
    return gateway_pb2.ChatMessages(messages=[gateway_pb2.ChatMessage(role=r, content=c) for r, c in messages])


def bias(*entries: tuple[int, float]) -> list[types_pb2.LogitBias]:
    return [types_pb2.LogitBias(token_id=token_id, bias=value) for token_id, value in entries]


async def resolved(tokens: Tokens, **fields: Any) -> JournalEntry:
    """The entry of a request for one sample."""
    (entry,) = await resolve(gateway_pb2.GenerateRequest(**fields), tokens, LIMITS, arrived=5.0)
    return entry


BAD = {
    "no input": ({}, "input: one of prompt, chat and token_ids"),
    "empty prompt": ({"prompt": ""}, "prompt: the prompt is empty"),
    "no messages": ({"chat": chat()}, "chat.messages: at least one"),
    "no role": ({"chat": chat(("user", "a"), ("", "b"))}, r"chat.messages\[1\].role"),
    "unknown role": ({"chat": chat(("wizard", "a"))}, "chat: the model's chat template refuses.*unknown role wizard"),
    "no ids": ({"token_ids": ids()}, "token_ids: the prompt is empty"),
    "id out of range": ({"token_ids": ids(1, 480)}, r"token_ids\[1\]: 480 is not below the vocabulary size of 480"),
    "huge id": ({"token_ids": ids(2**32 - 1)}, r"token_ids\[0\]: 4294967295"),
    "long prompt": ({"prompt": "x" * 64}, "prompt: the prompt has 64 tokens; the context limit of 64"),
    "very long prompt": ({"prompt": "x" * 100_000}, "prompt: too long: 100000 characters"),
    "very long chat": ({"chat": chat(("user", "x" * 100_000))}, "chat: too long: 100004 characters"),
    "many messages": ({"chat": chat(*[("user", "")] * 65)}, "chat.messages: 65 are too many"),
    "many ids": ({"token_ids": ids(*[1] * 64)}, "token_ids: the prompt has 64 tokens"),
    "no tokens wanted": ({"prompt": "a", "max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
    "negative max_tokens": ({"prompt": "a", "max_tokens": -5}, "max_tokens: must be at least 1, got -5"),
    "max_tokens over the limit": ({"prompt": "a", "max_tokens": 33}, "max_tokens: this gateway allows at most 32"),
    "max_tokens over the context": (
        {"token_ids": ids(*[1] * 50), "max_tokens": 15},
        "max_tokens: a prompt of 50 tokens leaves 14 of the context limit of 64, got 15",
    ),
    "temperature NaN": ({"prompt": "a", "temperature": math.nan}, "temperature must be between 0 and 100, got nan"),
    "temperature infinite": ({"prompt": "a", "temperature": math.inf}, "temperature"),
    "temperature negative": ({"prompt": "a", "temperature": -0.1}, "temperature"),
    "top_p 0": ({"prompt": "a", "top_p": 0.0}, "top_p must be above 0"),
    "top_p 1.5": ({"prompt": "a", "top_p": 1.5}, "top_p"),
    "top_p NaN": ({"prompt": "a", "top_p": math.nan}, "top_p"),
    "top_k negative": ({"prompt": "a", "top_k": -1}, "top_k"),
    "top_k huge": ({"prompt": "a", "top_k": 2**40}, "top_k"),
    "seed too large": ({"prompt": "a", "seed": 2**63}, "seed"),
    "many stop strings": ({"prompt": "a", "stop": [str(i) for i in range(17)]}, "stop: at most 16 strings, got 17"),
    "empty stop string": ({"prompt": "a", "stop": ["b", ""]}, r"stop\[1\]: must not be empty"),
    "long stop string": ({"prompt": "a", "stop": ["b" * 1025]}, r"stop\[0\]: at most 1024 characters, got 1025"),
    "many stop ids": ({"prompt": "a", "stop_token_ids": [1, 2, 3, 4, 5]}, "stop_token_ids: at most 4, got 5"),
    "stop id out of range": ({"prompt": "a", "stop_token_ids": [9999]}, r"stop_token_ids\[0\]: 9999"),
    "min_p NaN": ({"prompt": "a", "min_p": math.nan}, "min_p must be between 0 and 1, got nan"),
    "min_p 1.1": ({"prompt": "a", "min_p": 1.1}, "min_p"),
    "repetition_penalty 0": ({"prompt": "a", "repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    "repetition_penalty infinite": ({"prompt": "a", "repetition_penalty": math.inf}, "repetition_penalty"),
    "repetition_penalty NaN": ({"prompt": "a", "repetition_penalty": math.nan}, "repetition_penalty"),
    "presence_penalty 3": ({"prompt": "a", "presence_penalty": 3.0}, "presence_penalty must be between -2 and 2"),
    "presence_penalty NaN": ({"prompt": "a", "presence_penalty": math.nan}, "presence_penalty"),
    "frequency_penalty -3": ({"prompt": "a", "frequency_penalty": -3.0}, "frequency_penalty must be between -2 and 2"),
    "bias too large": ({"prompt": "a", "logit_bias": bias((7, 101.0))}, "logit_bias of token 7 must be between -100"),
    "bias NaN": ({"prompt": "a", "logit_bias": bias((7, math.nan))}, "logit_bias of token 7"),
    "bias of a token twice": (
        {"prompt": "a", "logit_bias": bias((7, 1.0), (7, 1.0))},
        "logit_bias names a token twice",
    ),
    "bias of no token": (
        {"prompt": "a", "logit_bias": bias((1, 1.0), (480, 1.0))},
        r"logit_bias\[1\]: 480 is not below",
    ),
    "many biases": (
        {"prompt": "a", "logit_bias": bias(*((index, 1.0) for index in range(301)))},
        "logit_bias: at most 300 tokens, got 301",
    ),
    "empty bad word": ({"prompt": "a", "bad_words": ["b", ""]}, r"bad_words\[1\]: must not be empty"),
    "long bad word": (
        {"prompt": "a", "bad_words": ["ok", "0123456789"]},
        r"bad_words\[1\]: '0123456789' has more than 8 tokens, got 10",
    ),
    "bad word that is too long behind a space": ({"prompt": "a", "bad_words": ["01234567"]}, r"bad_words\[0\].* got 9"),
    "very long bad word": ({"prompt": "a", "bad_words": ["x" * 10**6]}, r"bad_words\[0\]: 'x{40}…' has more than 8"),
    "many bad words": ({"prompt": "a", "bad_words": [str(i) for i in range(33)]}, "bad_words: at most 32, got 33"),
    "many sequences": (
        {"prompt": "a", "bad_words": [str(index) for index in range(17)]},
        "bad_words: with and without a space before them these are 34 token sequences, at most 32",
    ),
    "min_tokens negative": ({"prompt": "a", "min_tokens": -1}, "min_tokens: must be between 0 and max_tokens"),
    "min_tokens over max_tokens": (
        {"prompt": "a", "max_tokens": 5, "min_tokens": 6},
        "min_tokens: must be between 0 and max_tokens, which is 5, got 6",
    ),
    "min_tokens over the limit": ({"prompt": "a", "min_tokens": 33}, "max_tokens, which is 32, got 33"),
    "min_tokens over the context": (
        {"token_ids": ids(*[1] * 50), "min_tokens": 15},
        r"min_tokens must be between 0 and max_tokens \(14\), got 15",
    ),
    "logprobs negative": ({"prompt": "a", "logprobs": -1}, "logprobs: must be between 0 and 20, got -1"),
    "logprobs 21": ({"prompt": "a", "logprobs": 21}, "logprobs: must be between 0 and 20, got 21"),
    "no samples": ({"prompt": "a", "n": 0}, "n: must be between 1 and 16, got 0"),
    "17 samples": ({"prompt": "a", "n": 17}, "n: must be between 1 and 16, got 17"),
    "draft_nodes negative": ({"prompt": "a", "draft_nodes": -1}, "draft_nodes: must be between 0 and 1048576, got -1"),
    "draft_nodes huge": ({"prompt": "a", "draft_nodes": 2**40}, "draft_nodes"),
    "priority 101": ({"prompt": "a", "priority": 101}, "priority: must be between -100 and 100, got 101"),
    "priority -101": ({"prompt": "a", "priority": -101}, "priority: must be between -100 and 100, got -101"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD.keys())
async def test_bad_input_names_the_field(tokens: Tokens, fields: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await resolved(tokens, **fields)


async def test_a_model_without_chat_template_says_so() -> None:
    tokens = tiny_tokens(chat_template=None)
    with pytest.raises(InvalidRequestError, match="chat template"):
        await resolved(tokens, chat=chat(("user", "a")))
    tokens.close()


async def test_defaults(tokens: Tokens) -> None:
    entry = await resolved(tokens, prompt="the fox")
    assert tokens.decode(list(entry.prompt)) == "the fox"
    assert entry.max_tokens == 32
    assert entry.sampling == SamplingParams(seed=entry.sampling.seed)
    assert (entry.min_tokens, entry.logprobs, entry.draft_nodes, entry.priority) == (0, None, None, 0)
    assert entry.arrived == 5.0
    assert entry.stop_token_ids == tokens.eos_ids
    other = await resolved(tokens, prompt="the fox")
    assert (other.request_id, other.sampling.seed) != (entry.request_id, entry.sampling.seed)


async def test_default_max_tokens_is_what_the_context_leaves(tokens: Tokens) -> None:
    entry = await resolved(tokens, token_ids=ids(*[1] * 60))
    assert entry.max_tokens == 4


async def test_everything_given(tokens: Tokens) -> None:
    entry = await resolved(
        tokens,
        chat=chat(("system", "be brief"), ("user", "hello")),
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=11,
        stop=["a", "b", "a"],
        ignore_eos=True,
        stop_token_ids=[5, 5, 6],
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias=bias((3, -100.0), (0, 2.5)),
        bad_words=["fox"],
        min_tokens=2,
        logprobs=0,
        draft_nodes=0,
        priority=-4,
    )
    assert tokens.decode(list(entry.prompt)) == "<system>be brief\n<user>hello\n<assistant>"
    assert entry.sampling == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=11,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias=((3, -100.0), (0, 2.5)),
        bad_words=(tokens.encode_word("fox"), tokens.encode_word(" fox")),
    )
    assert (entry.min_tokens, entry.logprobs, entry.draft_nodes, entry.priority) == (2, 0, 0, -4)
    request = entry.next_request()
    assert (request.min_tokens, request.logprobs, request.draft_nodes) == (2, 0, 0)
    assert (entry.max_tokens, entry.stop, entry.stop_token_ids) == (7, ("a", "b"), (5, 6))


async def test_samples_differ_in_their_number_only(tokens: Tokens) -> None:
    entries = await resolve(gateway_pb2.GenerateRequest(prompt="the fox", n=3), tokens, LIMITS, arrived=5.0)
    assert [entry.sampling.sample_index for entry in entries] == [0, 1, 2]
    base = entries[0].request_id.removesuffix(".0")
    assert [entry.request_id for entry in entries] == [f"{base}.0", f"{base}.1", f"{base}.2"]
    assert len({entry.sampling.seed for entry in entries}) == 1
    assert len({entry.prompt for entry in entries}) == 1


async def test_bad_words_stand_for_their_token_sequences(tokens: Tokens) -> None:
    """Each once, with and without a space before it, and without the special tokens that a prompt may get."""
    entry = await resolved(tokens, prompt="a", bad_words=["fox", " fox", "fox", "日本"])
    words = ["fox", " fox", "  fox", "日本", " 日本"]
    assert entry.sampling.bad_words == tuple(tokens.encode_word(word) for word in words)
    assert [tokens.decode(list(word)) for word in entry.sampling.bad_words] == words


async def test_long_input_is_encoded_off_the_loop_and_alike(tokens: Tokens) -> None:
    text = "the quick brown fox " * 1000
    assert await tokens.encode(text) == tuple(tokens._tokenizer.encode(text))


def entry(**changes: object) -> JournalEntry:
    fields = {
        "request_id": "r",
        "prompt": (1, 2),
        "max_tokens": 3,
        "sampling": SamplingParams(seed=4),
        "stop_token_ids": (9,),
    }
    return JournalEntry(**{**fields, **changes})


class TestJournal:
    def test_the_next_attempt_goes_on_at_the_next_token(self) -> None:
        journal = entry()
        journal.record([5, 6])
        request = journal.next_request()
        assert (request.prompt, request.emitted, request.max_tokens) == ((1, 2), (5, 6), 3)
        assert request.sampling.seed == 4
        assert journal.ended is None

    def test_knows_that_it_has_ended(self) -> None:
        full, stopped = entry(), entry()
        full.record([5, 6, 7])
        stopped.record([5, 9])
        assert full.ended is FinishReason.LENGTH
        assert stopped.ended is FinishReason.STOP

    def test_keeps_the_reasons(self) -> None:
        journal = entry()
        assert journal.failovers == 0
        journal.attempts += [AttemptRecord("p:1", "d:1", "it broke"), AttemptRecord("p:1", "d:2")]
        assert journal.failovers == 1
        assert journal.failures == "attempt 1 (p:1 -> d:1): it broke"

    def test_preemptions_are_no_failures(self) -> None:
        journal = entry()
        stats = SpeculationStats(1, 2, 1)
        journal.attempts += [
            AttemptRecord("p:1", "d:1", "preempted", preempted=True, speculation=stats),
            AttemptRecord("p:1", "d:1", "it broke", speculation=stats),
            AttemptRecord("p:1", "d:1", "preempted", preempted=True),
            AttemptRecord("p:1", "d:1", speculation=stats),
        ]
        assert (journal.preemptions, journal.failovers, journal.failed_attempts) == (2, 1, 1)
        assert journal.speculation == stats + stats + stats

    def test_holds_the_invariants_of_a_request(self) -> None:
        with pytest.raises(InvalidRequestError):
            entry(prompt=())
