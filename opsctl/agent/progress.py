"""Counts bytes of long work and says so, but not more often than a person can read."""

from __future__ import annotations

import time
from collections.abc import Callable

Report = Callable[[int, int], None]  # bytes done, bytes in all


class Meter:
    """Adds up bytes and calls ``report`` at most every ``every_s`` seconds, and at the end."""

    def __init__(self, total: int, report: Report, every_s: float = 0.5,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.done = 0
        self.total = total
        self._report = report
        self._every_s = every_s
        self._clock = clock
        self._next = clock()

    def advance(self, count: int) -> None:
        self.done += count
        if self._clock() >= self._next or self.done >= self.total:
            self._next = self._clock() + self._every_s
            self._report(self.done, self.total)


def silent(_done: int, _total: int) -> None:
    """A ``Report`` for callers that do not listen."""
