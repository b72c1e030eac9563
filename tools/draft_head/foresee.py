"""What any static tree would accept, told from texts that are finished.

A node of a static tree is the head's guess of some rank behind the path that leads to it, and it is accepted if it is
the token that plain decoding says there; at any temperature, since what is drawn for a place, by target and head,
depends on the place alone. So the head drafts along each text, and the ranks that it gives the tokens that did follow
tell, without running it, what every static tree would have accepted; in 16 bits but for near-ties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch

from branchline.core import Request
from branchline.engine.models.protocol import Models
from branchline.engine.sampling import SamplingTensors, SamplingVariant, draft_scores
from tools.draft_head.causal import CausalAttention, Spans, context_attention
from tools.draft_head.head import with_ancestors
from tools.draft_head.measure import Tally
from tools.draft_head.shapes import NodeCounts, Path

#: Of trees that are deeper, or have more guesses behind a node, nothing is told.
DEPTH, GUESSES = 10, 10


@dataclass(frozen=True)
class Text:
    """For each place of a decode loop, the ranks of the tokens that follow: each among the head's guesses behind those
    before it, up to the first that isn't one of GUESSES."""

    category: str
    places: tuple[Path, ...]


@torch.inference_mode()
def foresee(models: Models, category: str, request: Request, answer: Sequence[int]) -> Text:
    """Of what plain decoding answered to a request without edits. Place r of the decode loop is where token r of the
    answer is the last one; the token k + 1 behind it is guessed by the head's k-th step from there, as in training
    (`head.py`)."""
    draft, device = models.draft, models.device
    assert draft is not None
    tokens = torch.tensor([*request.prompt, *answer], device=device)
    context, places = len(request.prompt) - 1, len(answer) - 1
    if not places:
        return Text(category, ())
    read = torch.arange(len(tokens) - 2, device=device)
    states = models.target.forward(tokens[:-2], read, CausalAttention((len(read),))).auxiliary
    assert states is not None
    entries = torch.full((models.target.spec.vocab_size,), -1, device=device)
    entries[draft.target_token_ids] = torch.arange(len(draft.target_token_ids), device=device)
    sampling, variant = SamplingTensors.empty(1, models.target.spec.vocab_size, device), SamplingVariant.of([request])
    sampling.load(0, request, None)
    attention = _Unrolled(context)
    normed, recurrent = draft.forward(tokens[1:-1], draft.fuse(states), read, attention)
    normed, recurrent = normed[context:], recurrent[context:]
    ranks = torch.full((places, DEPTH), GUESSES)
    for step in range(min(DEPTH, places)):
        count, guessed = places - step, context + 2 + step  # the last places have no token so far behind them
        if step:
            positions = read[context : context + count] + step
            normed, recurrent = draft.forward(tokens[guessed - 1 : -1], recurrent[:count], positions, attention)
        wanted, at = entries[tokens[guessed:], None], torch.arange(guessed, len(tokens), device=device)
        logits = draft.logits(normed).float()[None]
        (scores,) = draft_scores(logits, at[None], draft.target_token_ids, sampling, variant)
        rank = (scores > scores.gather(1, wanted.clamp(min=0))).sum(1, keepdim=True)
        ranks[:count, step] = rank.masked_fill(wanted < 0, GUESSES)[:, 0].clamp(max=GUESSES).to("cpu")
    known = (ranks < GUESSES).long().cumprod(1).sum(1).tolist()
    return Text(category, tuple(tuple(row[:end]) for row, end in zip(ranks.tolist(), known, strict=True)))


def node_counts(texts: Iterable[Text]) -> NodeCounts:
    """How often each node would be accepted, if the loop came to all places: of those that ever would, and of all that
    a tree could have behind one of them."""
    accepted: Counter[Path] = Counter()
    steps = 0
    for text in texts:
        steps += len(text.places)
        accepted.update(place[:depth] for place in text.places for depth in range(1, len(place) + 1))
    reached = [path for path in ((), *accepted) if len(path) < DEPTH]
    accepted.update(dict.fromkeys(((*path, guess) for path in reached for guess in range(GUESSES)), 0))
    return NodeCounts(steps, accepted)


def accept(texts: Iterable[Text], nodes: Container[Path]) -> Tally:
    """What the decode loop would do with a static tree of these nodes; it takes no time."""
    total = Tally()
    for text in texts:
        lengths = [0] * (DEPTH + 1)
        at, end = 0, len(text.places)
        while at < end:
            path = text.places[at]
            depth = next((depth for depth in range(len(path)) if path[: depth + 1] not in nodes), len(path))
            emitted = min(depth + 1, end - at)  # a request may end with its last accepted token
            lengths[emitted - 1] += 1
            at += emitted
        sums = sum(lengths), end - sum(lengths)
        total += Tally(*sums, lengths=tuple(lengths), categories={text.category: sums})
    return total


class _Unrolled:
    """The `Attention` of a head that drafts along a text. First all rows, each of which sees those up to itself; then,
    call by call, what is drafted behind the rows after `context`: each sees what its row saw, and its own ancestors."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._base: tuple[torch.Tensor, torch.Tensor] | None = None
        self._ancestors: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, window: int | None = None
    ) -> torch.Tensor:
        """See protocol.Attention. A head has one layer and no window."""
        assert layer == 0
        assert window is None
        if self._base is None:
            self._base = key, value
            return CausalAttention((len(query),)).attend(layer, query, key, value)
        count = len(query)
        self._ancestors = [(keys[:count], values[:count]) for keys, values in (*self._ancestors, (key, value))]
        (seen_keys, keys), (seen_values, values) = (
            torch.tensor_split(side[: self._context + count], [self._context]) for side in self._base
        )
        spans = Spans((self._context,), (count,))
        attended, log_sum = context_attention(query, seen_keys, seen_values, keys, values, spans)
        return with_ancestors(query, attended, log_sum, self._ancestors)
