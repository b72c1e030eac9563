"""The best static tree for a number of nodes, from how often each node was accepted.

The tokens that a step accepts are the nodes on one path, so the expected number is the sum of P(node is on the accepted
path) over the tree. A node is only there if its parent is, so P never grows from parent to child: the N nodes with the
largest P are connected, and no N others have a larger sum. That is all the search there is; one order, the likeliest
first, serves every budget. Sequoia (Chen et al. 2024, arXiv 2402.12374) takes P for a product of chances by rank and
searches by dynamic programming; OPT-Tree (Wang et al. 2024, arXiv 2406.17276) gives this argument for the head's own
probabilities in one step. Here P is counted, node by node (`foresee.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: A node by the ranks of the guesses that lead to it from the root.
Path = tuple[int, ...]

#: Acceptances of a parent that weigh as much as what all parents say about a rank: below it, a node's own count is
#: mostly chance.
_WEIGHT = 16.0


@dataclass(frozen=True)
class NodeCounts:
    """How often each node was accepted in `steps` steps; a node never is without its parent."""

    steps: int
    accepted: Mapping[Path, int]

    def __post_init__(self) -> None:
        for path, count in self.accepted.items():
            assert 0 <= count <= self.count(path[:-1]), path

    def count(self, path: Path) -> int:
        return self.accepted[path] if path else self.steps


def in_order(probabilities: Mapping[Path, float]) -> tuple[Path, ...]:
    """All nodes, the likeliest first and parents before their children: every prefix is the best tree of its size."""
    for path, probability in probabilities.items():
        assert probability <= probabilities.get(path[:-1], 1.0), f"{path} is likelier than its parent"
    # Where two are equal, the shorter: so a parent comes before a child that is as likely.
    return tuple(sorted(probabilities, key=lambda path: (-probabilities[path], len(path), path)))


def probabilities(counts: NodeCounts) -> dict[Path, float]:
    """P(node is on the accepted path). Given its parent, a node's chance is its own frequency, drawn to the mean of
    its rank over all parents, the more the seldomer the parent was reached."""
    by_rank = _by_rank(counts)
    result: dict[Path, float] = {(): 1.0}
    for path in sorted(counts.accepted, key=len):
        mean = by_rank[path[-1]]
        own = (counts.accepted[path] + _WEIGHT * mean) / (counts.count(path[:-1]) + _WEIGHT)
        result[path] = result[path[:-1]] * own
    del result[()]
    return result


def _by_rank(counts: NodeCounts) -> dict[int, float]:
    """The chance of a guess by its rank, given that its parent was accepted, over all parents that have it."""
    hits: dict[int, int] = {}
    reached: dict[int, int] = {}
    for path, count in counts.accepted.items():
        hits[path[-1]] = hits.get(path[-1], 0) + count
        reached[path[-1]] = reached.get(path[-1], 0) + counts.count(path[:-1])
    return {rank: hits[rank] / max(reached[rank], 1) for rank in hits}
