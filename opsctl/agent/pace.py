"""How fast bytes may come: a token bucket whose rate may change, or go, while the work runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from opsctl.agent.durable import remove_durably, write_atomically

LEAST_CHUNK = 4096
MOST_CHUNK = 1 << 20
BURST_S = 0.25  # of unused rate that may be caught up with
SLICE_S = 0.25  # of sleep, then the limit is looked at again
LEAST_BYTES_PER_S = 1000

Limit = Callable[[], "int | None"]  # bytes per second, None for none


def unlimited() -> int | None:
    return None


class Pace:
    """Sleeps off what came too fast. Time does not count for more than ``BURST_S`` of it."""

    def __init__(self, limit: Limit = unlimited, clock: Callable[[], float] = time.monotonic,
                 pause: Callable[[float], None] = time.sleep) -> None:
        self._limit = limit
        self._clock = clock
        self._pause = pause
        self._at = clock()
        self._debt = 0.0  # bytes that came before their time; negative: that may still come at once
        self._rate = limit()
        self._looked = self._at

    def chunk(self) -> int:
        """How many bytes to read next: a quarter of a second's, so that progress moves and no server gives up."""
        rate = self._now()
        return MOST_CHUNK if rate is None else max(LEAST_CHUNK, min(MOST_CHUNK, int(rate * SLICE_S)))

    def spend(self, count: int) -> None:
        """``count`` bytes came; sleeps until they were due."""
        self._settle(self._now())
        self._debt += count
        while (rate := self._now()) is not None and self._debt >= 1:
            self._pause(min(SLICE_S, self._debt / rate))
            self._settle(rate)
        if rate is None:
            self._debt = 0.0

    def _settle(self, rate: int | None) -> None:
        now = self._clock()
        if rate is not None:
            self._debt = max(-rate * BURST_S, self._debt - rate * (now - self._at))
        self._at = now

    def _now(self) -> int | None:
        if self._clock() - self._looked >= SLICE_S:
            self._rate = self._limit()
            self._looked = self._clock()
        return self._rate


def read_limit(path: Path) -> int | None:
    """Bytes per second that ``path`` allows; None, as fast as it goes, without that file."""
    try:
        return max(LEAST_BYTES_PER_S, int(path.read_text()))
    except (FileNotFoundError, ValueError):
        return None


def write_limit(path: Path, bytes_per_s: int | None) -> None:
    """Also while somebody reads it."""
    if bytes_per_s is None:
        remove_durably(path)
    else:
        write_atomically(path, f"{bytes_per_s}\n")
