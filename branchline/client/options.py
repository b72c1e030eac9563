"""The options of a generation and the request message made of them.

Only mistakes of type and shape are found here (`values`), those that a message cannot even carry; what a value means,
and whether it is allowed, the gateway decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from branchline.client.errors import InvalidRequestError
from branchline.client.values import (
    biases_value,
    chat_value,
    ids_value,
    integer_value,
    number_value,
    text_value,
    texts_value,
)
from branchline.v1 import gateway_pb2

#: Seconds that a call may take when nobody says otherwise.
DEFAULT_TIMEOUT_S = 600.0


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of all calls that generate."""

    #: At least 1. Default: what the context leaves, up to the gateway's limit.
    max_tokens: int | None
    #: 0, the default, is greedy.
    temperature: float | None
    #: Above 0, at most 1, which is the default and keeps every token.
    top_p: float | None
    #: 0, the default, keeps every token.
    top_k: int | None
    #: The same seed gives the same tokens. Default: drawn by the gateway and told in the result.
    seed: int | None
    #: Generation ends before any of these strings.
    stop: str | Sequence[str] | None
    #: Go on past the model's end-of-sequence tokens.
    ignore_eos: bool
    #: More token ids that end the generation.
    stop_token_ids: Sequence[int]
    #: From 0, the default, to 1: keeps tokens at least this likely relative to the likeliest one.
    min_p: float | None
    #: Above 0, at most 100; above 1, the default, disfavours tokens of the prompt and the output.
    repetition_penalty: float | None
    #: From -2 to 2, default 0: disfavour tokens of the output, once, and once per occurrence.
    presence_penalty: float | None
    frequency_penalty: float | None
    #: Token id -> what is added to its logit, from -100 to 100; at most 300.
    logit_bias: Mapping[int, float] | None
    #: Strings that the output is not to contain, as the tokenizer writes them with and without a space before them.
    bad_words: Sequence[str]
    #: No end-of-sequence or stop token is chosen before this many tokens; default 0.
    min_tokens: int | None
    #: Log-probabilities with every token: its own, and this many of the likeliest ones', 0 to 20. Default: none.
    logprobs: int | None
    #: Samples, 1 to 16, default 1; they share the computation of the prompt.
    n: int | None
    #: The most draft nodes verified in a step; 0 is plain decoding. Default: the workers' own tree. For speed only.
    draft_nodes: int | None
    #: From -100 to 100, higher first; default 0. One level is worth ten seconds of waiting.
    priority: int | None
    #: A name for what the request belongs to, a conversation or a user: its requests go to the same workers where the
    #: gateway routes by sessions. At most 1,024 characters.
    session: str | None
    #: Which of the models that are served, by a name of `models()`; default: the first of them.
    model: str | None


class GenerateOptions(SamplingOptions, total=False):
    """Keyword arguments of `generate` and `complete`. Exactly one of these three is needed."""

    prompt: str
    #: A chat: [{"role": "user", "content": "…"}, …]; the model's chat template is applied.
    messages: Sequence[Mapping[str, str]]
    token_ids: Sequence[int]


def generate_request(
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    token_ids: Sequence[int] | None = None,
    **options: Unpack[SamplingOptions],
) -> gateway_pb2.GenerateRequest:
    """Raises InvalidRequestError, naming the option, for a value that the message cannot carry."""
    inputs = (("prompt", prompt), ("messages", messages), ("token_ids", token_ids))
    given = [name for name, value in inputs if value is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"exactly one of prompt, messages and token_ids is needed, got {' and '.join(given) or 'none'}"
        )
    request = sampling_request(**options)
    if prompt is not None:
        request.prompt = text_value("prompt", prompt)
    elif messages is not None:
        request.chat.CopyFrom(chat_value(messages))
    elif token_ids is not None:
        request.token_ids.CopyFrom(gateway_pb2.TokenIds(ids=ids_value("token_ids", token_ids)))
    return request


def sampling_request(
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    ignore_eos: bool = False,
    stop_token_ids: Sequence[int] = (),
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    bad_words: Sequence[str] = (),
    min_tokens: int | None = None,
    logprobs: int | None = None,
    n: int | None = None,
    draft_nodes: int | None = None,
    priority: int | None = None,
    session: str | None = None,
    model: str | None = None,
) -> gateway_pb2.GenerateRequest:
    """Without an input. Raises InvalidRequestError, naming the option, for a value that the message cannot carry."""
    if not isinstance(ignore_eos, bool):
        raise InvalidRequestError(f"ignore_eos: must be True or False, got {ignore_eos!r}")
    return gateway_pb2.GenerateRequest(  # None leaves a field unset
        max_tokens=_count("max_tokens", max_tokens),
        temperature=_real("temperature", temperature),
        top_p=_real("top_p", top_p),
        top_k=_count("top_k", top_k),
        seed=None if seed is None else integer_value("seed", seed, 0, 2**63 - 1),
        stop=[] if stop is None else texts_value("stop", [stop] if isinstance(stop, str) else stop),
        ignore_eos=ignore_eos,
        stop_token_ids=ids_value("stop_token_ids", stop_token_ids),
        min_p=_real("min_p", min_p),
        repetition_penalty=_real("repetition_penalty", repetition_penalty),
        presence_penalty=_real("presence_penalty", presence_penalty),
        frequency_penalty=_real("frequency_penalty", frequency_penalty),
        logit_bias=[] if logit_bias is None else biases_value(logit_bias),
        bad_words=texts_value("bad_words", bad_words),
        min_tokens=_count("min_tokens", min_tokens),
        logprobs=_count("logprobs", logprobs),
        n=_count("n", n),
        draft_nodes=_count("draft_nodes", draft_nodes),
        priority=_count("priority", priority),
        session=None if session is None else text_value("session", session),
        model=None if model is None else text_value("model", model),
    )


def _count(name: str, value: Any) -> int | None:
    return None if value is None else integer_value(name, value, -(2**63), 2**63 - 1)


def _real(name: str, value: Any) -> float | None:
    return None if value is None else number_value(name, value)


def deadline(timeout: float) -> float:
    """The seconds that a call has. Every call has an end: infinity is refused."""
    seconds = number_value("timeout", timeout)
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequestError(f"timeout: must be a positive number of seconds, got {seconds}")
    return seconds
