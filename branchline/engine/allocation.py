"""One sequence's place in the decode worker's cache, from Reserve to the end, and what the host knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from branchline.core import Request
from branchline.engine.grammar import Grammar


@dataclass(eq=False)
class Allocation:
    """A sequence's blocks and batch slot. `length` is what the host knows of it.

    `rank` orders the allocations, the smallest being served first and preempted last; `group` are the samples of one
    request, this one included, and their context is `shared` once each has all of it.

    The rows of its first `complete` tokens are what prefill would compute from the same tokens, the target's and the
    draft head's: whole blocks of them may serve others. The last token's are never among them.
    """

    slot: int
    blocks: list[int]
    context_length: int
    max_length: int
    rank: float = 0.0
    priority: int = 0
    group: list[Allocation] = field(default_factory=list, repr=False)
    shared: bool = False
    #: Of its first whole blocks, see prefix_cache; None when it keeps its blocks to itself.
    keys: tuple[bytes, ...] | None = field(default=None, repr=False)
    #: Tokens whose rows it found in the cache, in whole blocks. Others read them: nobody may write there.
    held: int = 0
    #: Blocks from the front that are known by their keys.
    known: int = 0
    complete: int = 0
    #: No draft row is missing so far.
    unbroken: bool = False
    request: Request | None = None
    grammar: Grammar | None = field(default=None, repr=False)
    running: bool = False
    length: int = 0
    budget: int = 0
    drafted: int = 0
    released: bool = False
    #: The tokens behind the context, the last of which has no rows yet.
    _generated: list[int] = field(default_factory=list, repr=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All of them, once it has started."""
        assert self.request is not None
        return *self.request.context, *self._generated

    def arrived(self, drafts: bool) -> None:
        """The context's rows are in the cache; the draft head's too if `drafts`, but for the first token's."""
        self.shared, self.unbroken = True, drafts
        if drafts:
            self.complete = self.context_length

    def start(
        self, request: Request, first_token: int, budget: int, drafted: int, drafts: bool, grammar: Grammar | None
    ) -> None:
        """Joins the batch; `drafts`: all draft rows are there, the first token's included."""
        self.request, self.budget, self.drafted, self.running = request, budget, drafted, True
        self.grammar = grammar
        self.length = self.context_length
        self.unbroken = self.unbroken and drafts
        self._generated = [first_token]

    def advance(self, token_ids: Sequence[int], drafts: bool) -> None:
        """An iteration has brought tokens: each has rows from now on but the last, whose place the one before it took.
        `drafts`: the draft head's, too."""
        self.length += len(token_ids)
        self._generated += token_ids
        self.unbroken = self.unbroken and drafts
        if self.unbroken:
            self.complete = self.length

    def leave(self) -> None:
        self.running = False
