"""What has come of a hand-off, and whether it is all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from branchline.core import DraftTree, KvPart, KvSpan, TokenLogprobs
from branchline.engine.models.protocol import KvGeometry
from branchline.wire.index_set import IndexSet


@dataclass
class SampleArrival:
    """A sample's own part: its first token with the tree on it, and the draft row that belongs to that token."""

    first_token: int | None = None
    logprobs: TokenLogprobs | None = None
    tree: DraftTree = field(default_factory=DraftTree)
    row_bytes: int = 0


@dataclass
class Arrived:
    """It outlives broken streams, so that others go on from here."""

    samples: list[SampleArrival]
    #: The frames that have come.
    frames: IndexSet = field(default_factory=IndexSet)
    #: What the samples share: the target's KV, and the draft rows in front of the context's end.
    target_bytes: int = 0
    draft_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        return self.target_bytes + self.draft_bytes + sum(sample.row_bytes for sample in self.samples)

    @property
    def has_draft_kv(self) -> bool:
        return self.draft_bytes > 0 or any(sample.row_bytes for sample in self.samples)

    def count(self, span: KvSpan, sample: int, size: int, context_length: int) -> None:
        """Adds a KV frame of `size` bytes; row `context_length` of the draft is the sample's own."""
        if span.part is KvPart.TARGET:
            self.target_bytes += size
            return
        start, end = span.tokens
        own = size // (end - start) if end > context_length else 0
        self.samples[sample].row_bytes += own
        self.draft_bytes += size - own

    def missing(self, context_length: int, held: int, target: KvGeometry, draft: KvGeometry | None) -> str | None:
        """What a commit would have to wait for, in words for the sender, or None when all is there.

        The first `held` tokens' KV was here already. Draft KV may be left out altogether, and a sample without a tree
        needs no row of its own.
        """
        expected = (context_length - held) * target.bytes_per_token
        if self.target_bytes != expected:
            return f"{self.target_bytes} of {expected} bytes of the target's KV"
        for number, sample in enumerate(self.samples):
            if sample.first_token is None:
                return f"no draft frame, with the first token, of sample {number}"
        if not self.has_draft_kv:
            return None
        assert draft is not None, "draft KV was taken, but there is no draft head"
        expected = (context_length - max(1, held)) * draft.bytes_per_token
        if self.draft_bytes != expected:
            return f"{self.draft_bytes} of {expected} bytes of the draft's KV in front of row {context_length}"
        for number, sample in enumerate(self.samples):
            needless = sample.row_bytes == 0 and len(sample.tree) == 0
            if sample.row_bytes != draft.bytes_per_token and not needless:
                return f"{sample.row_bytes} of {draft.bytes_per_token} bytes of sample {number}'s draft row"
        return None
