"""A request goes to workers that have the beginning of its context, unless they are too busy for that to pay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from gateway.pool import Pair
from gateway.routing.policy import Demand, Forecast, Policy, block_keys, ordered, share_limit
from gateway.routing.prefix_index import PrefixIndex
from gateway.worker import Worker

#: Costs that differ by less than this share of a context are the same: a template's first line, which every chat has,
#: is no reason to send all chats to one worker.
_MARGIN = 0.125
#: Of a decode worker it counts how many such parts of the context it has.
_PARTS = 4
#: The weight of the latest prompt in the mean.
_LATEST = 0.05


class PrefixAffinity(Policy):
    """Prefill: the worker that would be done first, counted in tokens: those that wait there already, and those of the
    context that it would have to compute. What it has in its cache is worth just that many tokens, so a popular prefix
    makes no hot spot: when more tokens wait there than the prefix saves, another worker computes it, and has it too
    from then on. Of workers that cost the same the one with the fewest known blocks is first, so that unrelated
    contexts spread over all caches.

    Decode: of the workers that don't have much more than their share of requests, the one with the largest part of the
    context, in quarters; of these the least loaded. What it has needs no hand-off and no room of its own.
    """

    def __init__(self, block_size: int, capacity: int) -> None:
        """`block_size`: tokens in a block, as the workers have them; another size only makes guesses coarser.
        `capacity`: blocks that are remembered of a worker at most."""
        self._block_size = block_size
        self.index = PrefixIndex(capacity)
        self._mean_tokens = 0.0  # that a prompt left to compute

    def order(self, pairs: Sequence[Pair], demand: Demand) -> list[Pair]:
        prefill = self._prefill_rank({pair.prefill for pair in pairs}, demand)
        decode = self._decode_rank({pair.decode for pair in pairs}, demand)
        return ordered(pairs, prefill, decode)

    def placed(self, pair: Pair, demand: Demand, held_tokens: int) -> Forecast:
        """The prefill worker counts as having the context from now on: it will by the time of a later one's turn."""
        decode = self.index.of(pair.decode)
        decode.observe(self._matched(pair.decode, demand), held_tokens)
        cached, computed = self._matched(pair.prefill, demand), round(self._left(pair.prefill, demand))
        self.index.of(pair.prefill).add(demand.keys(self._block_size))
        self._mean_tokens += _LATEST * (computed - self._mean_tokens)
        return Forecast(cached, computed)

    def computed(self, prefill: Worker, forecast: Forecast, cached_tokens: int) -> None:
        self.index.of(prefill).observe(forecast.cached, cached_tokens)

    def has(self, decode: Worker, token_ids: tuple[int, ...]) -> None:
        self.index.of(decode).add(block_keys(token_ids, self._block_size))

    def _prefill_rank(self, workers: Collection[Worker], demand: Demand) -> Callable[[Worker], tuple[float, int, int]]:
        costs = {
            worker: worker.waiting_tokens + worker.others * self._mean_tokens + self._left(worker, demand)
            for worker in workers
        }
        limit = min(costs.values()) + _MARGIN * len(demand.context)

        def rank(worker: Worker) -> tuple[float, int, int]:
            cost = costs[worker]
            return cost if cost > limit else 0.0, len(self.index.of(worker)), worker.load

        return rank

    def _decode_rank(self, workers: Collection[Worker], demand: Demand) -> Callable[[Worker], tuple[bool, int, int]]:
        limit = share_limit(workers, demand.samples)

        def rank(worker: Worker) -> tuple[bool, int, int]:
            if worker.load + demand.samples > limit:
                return True, 0, worker.load
            part = 1 - self._left(worker, demand) / len(demand.context)
            return False, -round(_PARTS * part), worker.load

        return rank

    def _matched(self, worker: Worker, demand: Demand) -> int:
        """Tokens of the context that are known there. At least one is always left to compute."""
        blocks = self.index.of(worker).match(demand.keys(self._block_size))
        return min(blocks, (len(demand.context) - 1) // self._block_size) * self._block_size

    def _left(self, worker: Worker, demand: Demand) -> float:
        """Tokens that are not, as far as the guess is to be trusted."""
        return len(demand.context) - self.index.of(worker).trust * self._matched(worker, demand)
