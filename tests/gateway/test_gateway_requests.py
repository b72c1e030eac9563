"""From a client's request to the journal, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny_tokenizer import tiny_tokens

from branchline.core import FinishReason, InvalidRequestError, SamplingParams
from branchline.v1 import gateway_pb2
from gateway.journal import AttemptRecord, JournalEntry
from gateway.limits import Limits
from gateway.tokens import Tokens
from gateway.validate import resolve

LIMITS = Limits(max_model_len=64, max_tokens=32)


def ids(*values: int) -> gateway_pb2.TokenIds:
    return gateway_pb2.TokenIds(ids=values)


def chat(*messages: tuple[str, str]) -> gateway_pb2.ChatMessages:
    return gateway_pb2.ChatMessages(messages=[gateway_pb2.ChatMessage(role=r, content=c) for r, c in messages])


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
    "very long chat": ({"chat": chat(("user", "x" * 100_000))}, "chat: too long: 100000 characters"),
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
    )
    assert tokens.decode(list(entry.prompt)) == "<system>be brief\n<user>hello\n<assistant>"
    assert entry.sampling == SamplingParams(temperature=0.5, top_p=0.9, top_k=40, seed=11)
    assert (entry.max_tokens, entry.stop, entry.stop_token_ids) == (7, ("a", "b"), (5, 6))


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

    def test_holds_the_invariants_of_a_request(self) -> None:
        with pytest.raises(InvalidRequestError):
            entry(prompt=())
