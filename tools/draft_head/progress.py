"""How far a stage is: one rewritten line on a terminal, a line every ten seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

#: Seconds between two reports on a terminal, and without one.
ON_TERMINAL_S, ELSEWHERE_S = 0.2, 10.0


class Progress:
    """Counts from `done` to `total`; rate and time left are of this run, so that what an earlier run did doesn't count.

    A context manager: leaving it reports once more, so that the last line tells where it ended.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        say: Callable[[str], None],
        *,
        done: int = 0,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._unit, self._say, self._clock = total, unit, say, clock
        self._begun_with = self._done = done
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._began = self._reported = clock()
        self._note = ""
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add(self, count: int, note: str = "") -> None:
        """`count` more are done; `note` is shown behind the figures until another one comes."""
        self._done += count
        self._note = note or self._note
        if self._clock() - self._reported >= (ON_TERMINAL_S if self._terminal else ELSEWHERE_S):
            self._report()

    def close(self) -> None:
        self._report()
        if self._terminal:
            print(file=sys.stderr)

    def line(self) -> str:
        """`1,200 of 3,000 tokens (40 %), 310/s, 6 min left; note`."""
        rate = (self._done - self._begun_with) / max(self._clock() - self._began, 1e-9)
        share = 100 * self._done / self._total if self._total else 100
        text = f"{self._done:,} of {self._total:,} {self._unit} ({share:.0f} %), {rate:,.{0 if rate >= 10 else 1}f}/s"
        if rate > 0 and self._done < self._total:
            text += f", {_duration((self._total - self._done) / rate)} left"
        return text + (f"; {self._note}" if self._note else "")

    def _report(self) -> None:
        self._reported = self._clock()
        line = self.line()
        if self._terminal:
            print(f"\r{line.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            self._say(line)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
