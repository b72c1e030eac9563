"""What a client has of a request whose stream broke, so that it goes on behind that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.core import InvalidRequestError
from branchline.v1 import gateway_pb2
from gateway.limits import check_ids


@dataclass(frozen=True, slots=True)
class Received:
    """Of one sample; `finished`: the client knows its end, too."""

    token_ids: tuple[int, ...] = ()
    finished: bool = False


def received_samples(request: gateway_pb2.GenerateRequest, samples: int, vocab_size: int) -> tuple[Received, ...]:
    """One for each sample, also when the client has nothing. Raises InvalidRequestError."""
    given = request.received
    if not given:
        return (Received(),) * samples
    if len(given) != samples:
        raise InvalidRequestError(f"received: must be there for all {samples} samples or for none, got {len(given)}")
    if all(sample.finished for sample in given):
        raise InvalidRequestError("received: all samples are finished, nothing is left to do")
    if request.temperature and not request.HasField("seed"):
        raise InvalidRequestError("received: goes on with sampled tokens, so their seed must be given")
    for index, sample in enumerate(given):
        check_ids(f"received[{index}].token_ids", sample.token_ids, vocab_size)
    return tuple(Received(tuple(sample.token_ids), sample.finished) for sample in given)


def check_received(received: Sequence[Received], max_tokens: int, stop_token_ids: Sequence[int]) -> None:
    """Raises InvalidRequestError for what can't be the beginning of such a request's output."""
    for index, sample in enumerate(received):
        field, ids = f"received[{index}].token_ids", sample.token_ids
        if len(ids) > max_tokens:
            raise InvalidRequestError(f"{field}: {len(ids)} are more than max_tokens, {max_tokens}")
        if early := set(ids[:-1]).intersection(stop_token_ids):
            raise InvalidRequestError(f"{field}: goes on behind token {min(early)}, which ends an output")
