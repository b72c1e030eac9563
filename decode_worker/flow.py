"""What the streams of one hand-off share beside the frames themselves: the window, the commit, the repair of damage."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc

from branchline.v1 import decode_pb2
from branchline.wire.index_set import IndexSet
from branchline.wire.pulse import Pulse
from branchline.wire.status import RpcFailure

#: Frames that may wait for the engine at once, over all streams.
WINDOW_FRAMES = 16
#: Times that one frame is asked for again because it came damaged; then something is wrong for good.
MAX_REPAIRS = 8
#: Missing frames that one response asks for.
MAX_RESEND = 64


@dataclass(eq=False)
class HandoffFlow:
    """Lives on the event loop, from the reservation on."""

    #: Imports under way.
    in_flight: int = 0
    commit: decode_pb2.CommitFrame | None = None
    #: All frames below it have been acknowledged, on whichever stream.
    acknowledged: int = 0
    #: Beats when an import is done, and when the hand-off is complete.
    changed: Pulse = field(default_factory=Pulse)
    #: When any stream was heard last, when a new frame or the commit came, and when the last import was done.
    heard: float = 0.0
    progressed: float = 0.0
    idle_since: float = 0.0
    #: The open streams by number; each ends with this failure as soon as it is set.
    _streams: dict[int, asyncio.Future[RpcFailure]] = field(default_factory=dict)
    _repairs: Counter[int] = field(default_factory=Counter)
    #: What was missing at the last heartbeat.
    _suspects: frozenset[int] = frozenset()

    @property
    def has_room(self) -> bool:
        """A full window stops the reading; the transport's flow control then holds the sender back."""
        return self.in_flight < WINDOW_FRAMES

    def open(self, number: int) -> asyncio.Future[RpcFailure]:
        """A stream begins, in place of an earlier one of its number that may be half dead. `close` must follow."""
        self._end(self._streams.get(number), "another hand-off stream has taken over")
        self._streams[number] = over = asyncio.get_running_loop().create_future()
        return over

    def close(self, number: int, over: asyncio.Future[RpcFailure]) -> None:
        """The stream that `open` gave `over` to has ended."""
        if self._streams.get(number) is over:
            del self._streams[number]

    def end(self, reason: str) -> None:
        """Ends the open streams."""
        for over in self._streams.values():
            self._end(over, reason)

    def take_over(self, imported: asyncio.Future[None]) -> None:
        """A frame has come, and `imported` is its way into the cache."""
        self.in_flight += 1
        self.progressed = time.monotonic()
        imported.add_done_callback(self._on_imported)

    def repair(self, index: int) -> None:
        """Frame `index` came damaged and is to be asked for again. Raises RpcFailure when that doesn't help."""
        self._repairs[index] += 1
        if self._repairs[index] > MAX_REPAIRS:
            raise RpcFailure(grpc.StatusCode.DATA_LOSS, f"frame {index} came damaged {MAX_REPAIRS + 1} times")

    def overdue(self, frames: IndexSet) -> list[int]:
        """At a heartbeat: the frames that have been missing since the one before, behind which others have come.

        A damaged index makes another frame's; and streams are not equally fast, so a first look says nothing.
        """
        end = frames.end if self.commit is None else max(frames.end, min(self.commit.frames, frames.end + MAX_RESEND))
        missing = frozenset(frames.missing(end))
        overdue = sorted(missing & self._suspects)[:MAX_RESEND]
        self._suspects = missing
        return overdue

    def _on_imported(self, _: asyncio.Future[None]) -> None:
        self.in_flight -= 1
        self.idle_since = time.monotonic()
        self.changed.beat()

    @staticmethod
    def _end(over: asyncio.Future[RpcFailure] | None, reason: str) -> None:
        if over is not None and not over.done():
            over.set_result(RpcFailure(grpc.StatusCode.ABORTED, reason))
