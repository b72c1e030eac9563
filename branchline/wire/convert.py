"""Dataclasses of `branchline.core` to messages and back.

`…_to_proto` expects valid values. `…_from_proto` trusts nothing: a message that is incomplete or
contradicts itself raises `InvalidRequestError`, which names the field. Round trips are exact, except that
a draft tree's scores and log-probabilities travel as 32-bit floats.
"""

from __future__ import annotations

import math
from typing import assert_never

from branchline.core import (
    DraftTree,
    Fingerprint,
    FinishReason,
    InvalidRequestError,
    Request,
    SamplingParams,
    SpeculationStats,
    TokenLogprobs,
)
from branchline.v1 import decode_pb2, types_pb2
from branchline.wire.seals import seal


def request_to_proto(request: Request) -> types_pb2.Request:
    return types_pb2.Request(
        request_id=request.request_id,
        prompt=request.prompt,
        emitted=request.emitted,
        max_tokens=request.max_tokens,
        sampling=_sampling_to_proto(request.sampling),
        stop_token_ids=request.stop_token_ids,
        min_tokens=request.min_tokens,
        logprobs=request.logprobs,
        draft_nodes=request.draft_nodes,
    )


def request_from_proto(message: types_pb2.Request) -> Request:
    if not message.request_id:
        raise InvalidRequestError("request_id is empty")
    if not message.HasField("sampling"):
        raise InvalidRequestError("sampling is missing")
    return Request(
        request_id=message.request_id,
        prompt=tuple(message.prompt),
        emitted=tuple(message.emitted),
        max_tokens=message.max_tokens,
        sampling=_sampling_from_proto(message.sampling),
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        draft_nodes=message.draft_nodes if message.HasField("draft_nodes") else None,
    )


def _sampling_to_proto(sampling: SamplingParams) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=[types_pb2.LogitBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        bad_words=[types_pb2.TokenSequence(token_ids=word) for word in sampling.bad_words],
        sample_index=sampling.sample_index,
    )


def _sampling_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        bad_words=tuple(tuple(word.token_ids) for word in message.bad_words),
        sample_index=message.sample_index,
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> types_pb2.TokenLogprobs:
    return types_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def logprobs_from_proto(message: types_pb2.TokenLogprobs) -> TokenLogprobs:
    if len(message.top_token_ids) != len(message.top_logprobs):
        raise InvalidRequestError("log-probabilities need as many tokens as numbers")
    return TokenLogprobs(message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)))


def fingerprint_to_proto(fingerprint: Fingerprint) -> types_pb2.Fingerprint:
    return types_pb2.Fingerprint(target=dict(fingerprint.target), draft=fingerprint.draft)


def fingerprint_from_proto(message: types_pb2.Fingerprint) -> Fingerprint:
    """Raises InvalidRequestError without any target facts: two empty fingerprints would match anything."""
    if not message.target:
        raise InvalidRequestError("the fingerprint names no facts of the target model")
    return Fingerprint(target=dict(message.target), draft=message.draft)


def tree_to_proto(
    tree: DraftTree, *, index: int, first_token: int, sample: int = 0, logprobs: TokenLogprobs | None = None
) -> decode_pb2.DraftFrame:
    """The hand-off's frame number `index`: a sample's root token and the tree that hangs on it."""
    frame = decode_pb2.DraftFrame(
        index=index,
        first_token=first_token,
        tree_tokens=tree.tokens,
        tree_parents=tree.parents,
        tree_scores=tree.scores,
        sample=sample,
        first_logprobs=None if logprobs is None else logprobs_to_proto(logprobs),
    )
    seal(frame)
    return frame


def tree_from_proto(message: decode_pb2.DraftFrame) -> DraftTree:
    scores = tuple(message.tree_scores)
    if any(math.isnan(score) for score in scores):
        raise InvalidRequestError("a draft tree's score is not a number")
    return DraftTree(tokens=tuple(message.tree_tokens), parents=tuple(message.tree_parents), scores=scores)


def speculation_to_proto(stats: SpeculationStats) -> types_pb2.Speculation:
    return types_pb2.Speculation(target_forwards=stats.target_forwards, drafted=stats.drafted, accepted=stats.accepted)


def speculation_from_proto(message: types_pb2.Speculation) -> SpeculationStats:
    return SpeculationStats(target_forwards=message.target_forwards, drafted=message.drafted, accepted=message.accepted)


def finish_reason_to_proto(reason: FinishReason | None) -> types_pb2.FinishReason:
    """None, "not finished", is FINISH_REASON_UNSPECIFIED."""
    match reason:
        case None:
            return types_pb2.FINISH_REASON_UNSPECIFIED
        case FinishReason.STOP:
            return types_pb2.FINISH_REASON_STOP
        case FinishReason.LENGTH:
            return types_pb2.FINISH_REASON_LENGTH
        case _:
            assert_never(reason)


def finish_reason_from_proto(value: types_pb2.FinishReason) -> FinishReason | None:
    match value:
        case types_pb2.FINISH_REASON_UNSPECIFIED:
            return None
        case types_pb2.FINISH_REASON_STOP:
            return FinishReason.STOP
        case types_pb2.FINISH_REASON_LENGTH:
            return FinishReason.LENGTH
        case _:
            raise InvalidRequestError(f"finish reason {value} is unknown")
