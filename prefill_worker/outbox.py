"""What a hand-off has to send, and what it has sent: shared by the hand-off's streams."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from branchline.v1 import decode_pb2
from branchline.wire.kv_codec import KvMessage, Outgoing
from branchline.wire.pulse import Pulse
from branchline.wire.seals import seal
from branchline.wire.transfer import MAX_AHEAD

#: Bytes of KV in hand that are not acknowledged, over all streams. Twice what is acknowledged at once; more only means
#: that each frame has left the processor's caches before its next copy.
WINDOW_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class HandoffTotals:
    frames: int
    kv_bytes: int
    tree_nodes: int


class Outbox:
    """Frames stay in hand until they are acknowledged. Belongs to one event loop."""

    def __init__(self) -> None:
        #: Not acknowledged, by index, in order.
        self._held: dict[int, Outgoing] = {}
        #: Those of them that are to be sent, or sent again, the next one first.
        self._queue: deque[int] = deque()
        #: Those of them that have been sent, with the stream that carried them last.
        self._carrier: dict[int, int] = {}
        self._window = 0
        self._totals = HandoffTotals(0, 0, 0)
        self._finished = False
        #: The stream that carries the commit.
        self._committed: int | None = None
        #: Beats with everything that changes.
        self.changed = Pulse()
        #: All frames below it are acknowledged.
        self.acknowledged = 0
        #: The decode worker has everything.
        self.ready = False

    @property
    def totals(self) -> HandoffTotals:
        return self._totals

    @property
    def has_room(self) -> bool:
        return self._window < WINDOW_BYTES and self._totals.frames - self.acknowledged < MAX_AHEAD

    @property
    def backlog(self) -> int:
        """Frames that wait for a stream."""
        return len(self._queue)

    def put(self, message: Outgoing) -> None:
        """The next frame; indices count from 0."""
        index, size, totals = _index(message), _size(message), self._totals
        nodes = 0 if isinstance(message, KvMessage) else len(message.draft.tree_tokens)
        assert index == totals.frames, f"frame {index} instead of {totals.frames}"
        assert not self._finished, f"frame {index} behind the last one"
        self._held[index] = message
        self._queue.append(index)
        self._window += size
        self._totals = HandoffTotals(totals.frames + 1, totals.kv_bytes + size, totals.tree_nodes + nodes)
        self.changed.beat()

    def finish(self) -> None:
        """There are no more frames."""
        self._finished = True
        self.changed.beat()

    def take(self, stream: int) -> Outgoing | None:
        """What `stream` is to send next, the commit behind all frames; None while there is nothing."""
        while self._queue:
            index = self._queue.popleft()
            if index in self._held:  # else it was acknowledged while it waited to be sent again
                self._carrier[index] = stream
                return self._held[index]
        if self._finished and self._committed is None:
            self._committed = stream
            return self._commit()
        return None

    def give_back(self, stream: int) -> None:
        """`stream` has broken: what it carried, and isn't acknowledged, is to be sent again."""
        lost = [index for index, carrier in self._carrier.items() if carrier == stream]
        for index in lost:
            del self._carrier[index]
        self._queue.extendleft(sorted(lost, reverse=True))
        if self._committed == stream:
            self._committed = None
        self.changed.beat()

    def acknowledge(self, response: decode_pb2.HandoffResponse) -> None:
        """Drops what the decode worker has, and sends again what it asks for."""
        while self.acknowledged < min(response.next_index, self._totals.frames):
            self._window -= _size(self._held.pop(self.acknowledged))
            self._carrier.pop(self.acknowledged, None)
            self.acknowledged += 1
        for index in response.resend:
            if self._carrier.pop(index, None) is not None:  # else it is acknowledged, or queued already
                self._queue.appendleft(index)
        self.ready = self.ready or response.ready
        self.changed.beat()

    def _commit(self) -> decode_pb2.HandoffRequest:
        commit = decode_pb2.CommitFrame(frames=self._totals.frames, kv_bytes=self._totals.kv_bytes)
        seal(commit)
        return decode_pb2.HandoffRequest(commit=commit)


def _index(message: Outgoing) -> int:
    return message.index if isinstance(message, KvMessage) else message.draft.index


def _size(message: Outgoing) -> int:
    return message.kv_bytes if isinstance(message, KvMessage) else 0
