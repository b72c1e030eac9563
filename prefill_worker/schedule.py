"""Who gets how many tokens of a step. Pure book-keeping, driven by `engine_loop`.

Half of the budget belongs to the prompt of the smallest rank (a virtual arrival time, `core.rank_of`), so that a long
prompt gets on whatever comes after it, and everybody is the first one day. The other half goes to those with the least
left to do, so that short prompts don't wait for long ones. Nothing is left unused while somebody could use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A prompt with `left` tokens to compute. `next_block` names the content of the block that comes next, None when
    nobody else's could take its place."""

    job_id: int
    rank: float
    left: int
    next_block: bytes | None = None

    def __post_init__(self) -> None:
        assert self.left >= 1, self


def share(budget: int, waiting: Sequence[Waiting]) -> list[tuple[int, int]]:
    """(job id, tokens) of those that are computed in this step, at least one token each, `budget` at most in all.

    Of several that need the same block next only one computes it; the others take it over in a later step.
    """
    assert budget >= 1, budget
    if not waiting:
        return []
    first = min(waiting, key=lambda one: (one.rank, one.job_id))
    others = sorted((one for one in waiting if one is not first), key=lambda one: (one.left, one.rank, one.job_id))
    half = max(1, budget // 2) if others else budget
    tokens = {first.job_id: min(first.left, half)}
    rest = budget - tokens[first.job_id]
    blocks = {first.next_block}
    for one in others:
        if rest == 0:
            break
        if one.next_block is not None and one.next_block in blocks:
            continue
        blocks.add(one.next_block)
        tokens[one.job_id] = min(one.left, rest)
        rest -= tokens[one.job_id]
    tokens[first.job_id] += min(rest, first.left - tokens[first.job_id])
    return list(tokens.items())
