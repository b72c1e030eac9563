"""How many nodes to draft, by load: what brings the most tokens a second, found out while serving.

Verifying a node costs nothing while reading the weights takes longer than computing with them, and as much as a token
of plain decoding once it doesn't: so a large tree pays at one request and costs at many. Where that turns depends on
machine, model, head and text, so it is measured: the time of an iteration by batch and budget, and the tokens that
each budget would have brought. The latter is known for every budget up to the one that ran, since a tree's first nodes
are the tree of a smaller budget. So only times have to be tried out: now and then those of the budgets next to the
best one. What is drafted never changes what is decoded, only how far one iteration reaches.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Iterations of a trial, the first of which doesn't count: it may capture or allocate something.
TRIAL = 4
#: Iterations between two trials of budgets that have been tried before.
TRIAL_EVERY = 256
#: Timings of a budget that are looked back on; their median is its time.
LOOK_BACK = 9
#: Iterations of one request that tell enough of a budget's tokens to compare it with smaller ones.
ENOUGH = 64
#: Iterations of one request over which the mean of its tokens is taken.
MEMORY = 500
#: How much better another budget must be to take over: less is noise.
MARGIN = 1.03


@dataclass
class _Load:
    """What is known at one batch size. `best` and the keys of `seconds` are positions in the list of budgets."""

    best: int
    seconds: dict[int, deque[float]] = field(default_factory=dict)
    trial: int | None = None
    left: int = 0
    since_trial: int = 0
    above_next: bool = False

    def time(self, index: int) -> float | None:
        times = self.seconds.get(index)
        return statistics.median(times) if times else None


class LoadBudget:
    """Chooses budgets between 0 and `nodes`: 0, the powers of two below `nodes`, and `nodes`.

    The whole tree is where it begins. Budget 0, plain decoding, costs the requests that run their draft rows, so it is
    tried only where one node is the best of the others.
    """

    def __init__(self, nodes: int) -> None:
        assert nodes >= 1, nodes
        powers = [1 << power for power in range((nodes - 1).bit_length())]
        self.budgets = (0, *powers, nodes)
        #: Mean tokens of one request's iteration by budget, and from how many iterations.
        self._tokens = [1.0] * len(self.budgets)
        self._counts = [0] * len(self.budgets)
        self._loads: dict[int, _Load] = {}

    def choose(self, batch: int) -> int:
        """The budget of the next iteration at a batch size (a bucket's, not that of a single moment)."""
        load = self._load(batch)
        if load.trial is None and self._counts[load.best] >= ENOUGH:
            load.trial = self._next_trial(load)
            load.left = TRIAL
        return self.budgets[load.best if load.trial is None else load.trial]

    def learn(self, batch: int, nodes: int, seconds: float, paths: Sequence[tuple[int, Sequence[int]]]) -> None:
        """What an iteration of a budget took, and for each request how many nodes its tree had and which of them were
        accepted: their numbers, from 1, ascending."""
        for drafted, path in paths:
            self._count(drafted, path)
        if nodes not in self.budgets:
            return  # all requests of the batch asked for fewer
        load, index = self._load(batch), self.budgets.index(nodes)
        trying = load.trial == index
        if not (trying and load.left == TRIAL):
            load.seconds.setdefault(index, deque(maxlen=LOOK_BACK)).append(seconds)
        if trying:
            load.left -= 1
        load.since_trial += 1
        if load.trial is not None and load.left == 0:
            load.trial, load.since_trial = None, 0
        self._settle(load)

    def tokens(self, nodes: int) -> float:
        """Tokens that an iteration of one request brings with a budget, as far as is known."""
        return self._tokens[self.budgets.index(nodes)]

    def _load(self, batch: int) -> _Load:
        if batch not in self._loads:
            near = min(self._loads, key=lambda other: abs(other - batch), default=None)
            best = len(self.budgets) - 1 if near is None else max(self._loads[near].best, 1)
            self._loads[batch] = _Load(best, trial=best, left=TRIAL)
        return self._loads[batch]

    def _next_trial(self, load: _Load) -> int | None:
        """A neighbour of the best that was never tried; if there is none, from time to time one that was."""
        neighbours = [at for at in (load.best - 1, load.best + 1) if 0 <= at < len(self.budgets)]
        fresh = [at for at in neighbours if at not in load.seconds]
        if fresh:
            return fresh[0]
        if load.since_trial < TRIAL_EVERY:
            return None
        load.above_next = not load.above_next
        return neighbours[-1] if load.above_next else neighbours[0]

    def _settle(self, load: _Load) -> None:
        rates = {at: self._tokens[at] / time for at in load.seconds if (time := load.time(at))}
        if load.trial is not None or load.best not in rates or self._counts[load.best] < ENOUGH:
            return
        best = max(rates, key=lambda at: rates[at])
        if rates[best] > MARGIN * rates[load.best]:
            load.best = best

    def _count(self, drafted: int, path: Sequence[int]) -> None:
        for index, budget in enumerate(self.budgets):
            if budget > drafted:
                return
            accepted = sum(node <= budget for node in path)
            self._counts[index] = min(self._counts[index] + 1, MEMORY)
            self._tokens[index] += (1 + accepted - self._tokens[index]) / self._counts[index]
